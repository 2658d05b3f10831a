"""A reward from preferences: how pairs are split, what is fitted and chosen, and its use."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import alignpro
from alignpro.cli import app
from alignpro.config import (
    LoraConfig,
    ModelConfig,
    PreferencesConfig,
    RewardFitConfig,
    TrainConfig,
    from_mapping,
)
from alignpro.config.prefer import HeldOutPreferencesConfig
from alignpro.data.files import DataError
from alignpro.data.preferences import PreferenceRow
from alignpro.models.answer_scores import chunks
from alignpro.models.native_model import load_model
from alignpro.rewards import build_reward
from alignpro.rewards.check import rewards_unread_by
from alignpro.rewards.learned import LearnedReward, answer_features, read_answer
from alignpro.train.reward_fit import fit_reward, opening, run_reward_fit, split_rows
from alignpro.types import Conversation, SamplingParams

CONFIG = RewardFitConfig(folds=4)


def rows_of(count, first=0):
    return [PreferenceRow(f"question {i}", "yes indeed", "no") for i in range(first, first + count)]


def features_of(count, size=6, signal=1.0, seed=0):
    """[count, 2, size]: chosen answers are ahead in the first feature, by ``signal``."""
    made = np.random.default_rng(seed).normal(size=(count, 2, size))
    made[:, 0, 0] += signal
    made[:, :, 1] *= 1000  # states have features of any scale
    return made.astype(np.float32)


# --- how pairs are split ---


def test_a_conversation_is_what_it_begins_with():
    long = Conversation((("system", "s"), ("user", "Hi"), ("assistant", "Hello!")), "Why?")
    assert opening(PreferenceRow(long, "a", "b")) == (("system", "s"), ("user", "Hi"))
    assert opening(PreferenceRow("Why?", "a", "b")) == (("user", "Why?"),)


def test_no_conversation_is_on_both_sides():
    later = [
        PreferenceRow(
            Conversation((("user", row.prompt), ("assistant", "Go on.")), "So?"), "a", "b"
        )
        for row in rows_of(40)
    ]
    rows = [*rows_of(40), *later, *rows_of(40)]  # every conversation three times
    training, held_out = split_rows(rows, None, CONFIG)
    assert len(held_out) == 24 and len(training) == 96  # a fifth of the conversations
    assert not {opening(row) for row in training} & {opening(row) for row in held_out}
    assert split_rows(rows, None, CONFIG) == (training, held_out)
    other = split_rows(rows, None, RewardFitConfig(folds=4, seed=1))[1]
    assert other != held_out


def test_what_is_held_out_is_left_out_of_the_fit(caplog):
    config = RewardFitConfig(folds=4, heldout=HeldOutPreferencesConfig())
    training, held_out = split_rows(rows_of(20), rows_of(5, first=18), config)
    assert (len(training), len(held_out)) == (18, 5)
    assert "2 of 20 pairs belong to conversations that are held out" in caplog.text


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (rows_of(1) * 30, "at least 4 conversations that begin differently to be fit to"),
        (rows_of(5), "at least 2 conversations that begin differently to be held out, got 1"),
    ],
)
def test_too_few_conversations_are_said(rows, line):
    with pytest.raises(DataError, match=line):
        split_rows(rows, None, CONFIG)


# --- what is fitted ---


def test_a_signal_is_found_and_its_confidence_is_right():
    """Margins of Bradley and Terry's own model: the fit is calibrated, and none is better."""
    rng = np.random.default_rng(1)
    made = rng.normal(size=(6000, 2, 4))
    first = rng.uniform(size=6000) < 1 / (1 + np.exp(-1.5 * (made[:, 0, 0] - made[:, 1, 0])))
    made[~first] = made[~first][:, ::-1]
    features = made.astype(np.float32)
    rows = rows_of(6000)
    fit = fit_reward(rows[:3000], features[:3000], rows[3000:], features[3000:], CONFIG)
    assert fit.weights[0] == pytest.approx(1.5, abs=0.15) and abs(fit.weights[1:]).max() < 0.15
    quality = fit.held_out
    best = (np.sign(features[3000:, 0, 0] - features[3000:, 1, 0]) > 0).mean()
    assert quality.accuracy.mean == pytest.approx(best, abs=0.01)
    assert quality.accuracy.low < best < quality.accuracy.high
    assert quality.calibration.error < 0.03
    margins = 1.5 * (features[3000:, 0, 0] - features[3000:, 1, 0])
    brier = np.square(1 - 1 / (1 + np.exp(-margins))).mean()
    assert quality.calibration.brier == pytest.approx(brier, abs=0.01)
    assert (quality.pairs, quality.conversations) == (3000, 3000)


def test_a_feature_in_other_units_changes_nothing_but_its_weight():
    rows, features = rows_of(200), features_of(200)
    fit = fit_reward(rows[:150], features[:150], rows[150:], features[150:], CONFIG)
    scaled = features * np.array([1, 1, 8, 1, 1, 1], np.float32)
    other = fit_reward(rows[:150], scaled[:150], rows[150:], scaled[150:], CONFIG)
    assert other.strength == fit.strength
    np.testing.assert_allclose(other.weights[2] * 8, fit.weights[2], rtol=1e-5)
    still = features.copy()
    still[:, :, 3] = 5.0  # never moves
    assert fit_reward(rows[:150], still[:150], rows[150:], still[150:], CONFIG).weights[3] == 0


def test_the_mean_of_the_answers_fitted_is_0():
    rows, features = rows_of(100), features_of(100)
    fit = fit_reward(rows[:80], features[:80], rows[80:], features[80:], CONFIG)
    assert abs((features[:80] @ fit.weights + fit.bias).mean()) < 1e-5


def test_noise_asks_for_a_strong_penalty_and_shows_as_chance():
    rows = rows_of(400)
    noise, clear = features_of(400, size=50, signal=0.0), features_of(400, size=50, signal=3.0)
    none = fit_reward(rows[:300], noise[:300], rows[300:], noise[300:], CONFIG)
    some = fit_reward(rows[:300], clear[:300], rows[300:], clear[300:], CONFIG)
    assert none.strength > some.strength
    assert none.held_out.accuracy.low < 0.5 < none.held_out.accuracy.high
    assert some.held_out.accuracy.low > 0.8
    assert none.training_accuracy > 0.6  # which says nothing


def test_what_is_held_out_chooses_nothing():
    rows, features = rows_of(200), features_of(200)
    fit = fit_reward(rows[:150], features[:150], rows[150:], features[150:], CONFIG)
    swapped = fit_reward(rows[:150], features[:150], rows[150:], features[150:, ::-1], CONFIG)
    assert np.array_equal(fit.weights, swapped.weights) and fit.strength == swapped.strength
    assert fit.fold_losses == swapped.fold_losses
    one, other = fit.held_out.accuracy, swapped.held_out.accuracy
    assert one.mean == pytest.approx(1 - other.mean)


def test_equal_rewards_count_a_half_and_lengths_are_compared():
    rows = [PreferenceRow(f"q{i}", "longer one", "short") for i in range(100)]
    same = np.repeat(features_of(100)[:, :1], 2, axis=1)
    mixed = np.concatenate([features_of(80), same[80:]])
    quality = fit_reward(rows[:80], mixed[:80], rows[80:], mixed[80:], CONFIG).held_out
    assert (quality.accuracy.mean, quality.longer) == (0.5, 1.0)
    assert quality.log_loss == pytest.approx(np.log(2))
    assert quality.calibration.error == 0.0  # half as sure, half as often right


def test_a_conversation_counts_once():
    rows = [*rows_of(80), *rows_of(10, first=100), *rows_of(1, first=200) * 30]
    features = features_of(len(rows), signal=50.0)
    features[90:] = features[90:, ::-1]  # thirty pairs of one conversation, all the wrong way
    fit = fit_reward(rows[:80], features[:80], rows[80:], features[80:], CONFIG)
    assert fit.held_out.accuracy.mean == pytest.approx(10 / 11)
    assert (fit.held_out.pairs, fit.held_out.conversations) == (40, 11)


# --- on the engine ---

THINGS = ["heron", "roof", "hand", "rain", "road", "tide", "bird", "tin", "hill", "lamp"]


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """A folder with a model, pairs and a reward fitted to them by the command."""
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree(tiny_model_dir("llama"), folder / "model")
    rows = [
        {
            "prompt": f"what is a {one} {other}",
            "chosen": "be kind and warm",
            "rejected": "no no no",
            "split": "heldout" if i > 6 else "train",
        }
        for i, one in enumerate(THINGS)
        for other in THINGS[:3]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke(
        *("reward", "fit", folder / "pairs.jsonl", f"model={folder / 'model'}", "heldout={}"),
        *("threads=1", "--output", folder / "kind"),
    )
    assert "On 9 held-out pairs of 9 conversations" in done and "accuracy" in done
    assert f"reward: learned:{folder / 'kind'}" in done
    return folder


def invoke(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_a_reward_by_its_name(made):
    reward = build_reward(f"learned:{made / 'kind'}")
    prompts = ["what is a heron", "what is a tide"]
    kind, cold = ("be kind and warm", "no no no")
    scores = reward(prompts, ["", ""], [kind, kind])
    assert min(scores) > max(reward(prompts, ["", ""], [cold, cold]))
    record = json.loads((made / "kind" / "reward.json").read_text())
    model = load_model(made / "model", threads=1)
    chats = [read_answer(model, prompt, kind, "mean") for prompt in prompts]
    features = answer_features(model, chats).astype(np.float64)
    np.testing.assert_array_equal(scores, features @ np.array(record["weights"]) + record["bias"])
    assert record["heldout"]["accuracy"]["mean"] == 1.0 > record["heldout"]["accuracy"]["low"]
    assert record["training"]["pairs"] == 21 and record["config"]["heldout"]["split"] == "heldout"


@pytest.mark.parametrize("state", ["mean", "end"])
def test_states_are_those_behind_the_answers_tokens(made, state):
    """By one score of the whole chat: the states that each next token would be predicted from."""
    model = load_model(made / "model", threads=1)
    asked = [{"role": "user", "content": "what is a heron"}]
    said = [*asked, {"role": "assistant", "content": "be kind"}]
    chat = model.tokenizer.encode_chat(said, add_generation_prompt=False)
    end = max(i for i, token in enumerate(chat) if token in model.tokenizer.eos_ids)
    answer = read_answer(model, "what is a heron", "be kind", state)
    assert answer.tokens == chat[: end + 1]
    first = len(model.tokenizer.encode_chat(asked))
    assert answer.start == {"mean": first, "end": end}[state]
    score = model.core_model.score([[*chat[: end + 1], 7]], [1], with_hidden=True)
    (feature,) = answer_features(model, [answer])
    np.testing.assert_array_equal(feature, score.hidden[answer.start :].mean(axis=0))
    assert len(score.hidden[answer.start :]) == {"mean": end + 1 - first, "end": 1}[state]


def test_an_answer_that_is_empty_has_its_end(made):
    model = load_model(made / "model", threads=1)
    answer = read_answer(model, "what is a heron", "", "mean")
    assert answer.start == len(answer.tokens) - 1


def test_a_row_depends_on_no_other(made, monkeypatch):
    model = load_model(made / "model", threads=2)
    chats = [read_answer(model, f"what is a {thing}", "be kind", "mean") for thing in THINGS]
    together = answer_features(model, chats)
    few = functools.partial(chunks, most=2 * len(chats[0].tokens))
    monkeypatch.setattr("alignpro.rewards.learned.chunks", few)
    seen = []
    parts = answer_features(model, chats, lambda done, total: seen.append((done, total)))
    assert len(seen) > 2 and seen[-1] == (10, 10)
    assert np.array_equal(together, parts)
    assert np.array_equal(together[3], answer_features(model, chats[3:4])[0])


def test_a_conversation_is_read_as_a_whole(made):
    reward = LearnedReward(made / "kind", model=load_model(made / "model", threads=1))
    messages = [
        {"role": "user", "content": "what is a roof"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "what is a heron"},
    ]
    alone = reward(["what is a heron"], [""], ["be kind"])
    whole = reward(["what is a heron"], [""], ["be kind"], conversations=[messages])
    assert alone != whole
    assert alone == reward(["what is a heron"], [""], ["be kind"], conversations=[messages[2:]])
    assert reward([], [], []) == []


def test_a_run_is_trained_by_it_and_knows_it_again(made, tmp_path):
    shutil.copytree(made / "kind", tmp_path / "kind")
    config = TrainConfig(
        prompter=ModelConfig(str(made / "model")),
        data=alignpro.DataConfig(str(made / "pairs.jsonl")),
        reward=f"learned:{tmp_path / 'kind'}+0.1*letter_reward:count_e",
        run_dir=str(tmp_path / "run"),
        rewrite=SamplingParams(max_new_tokens=3),
        response=SamplingParams(max_new_tokens=4),
        steps=1,
        prompts_per_step=2,
        num_rewrites=2,
        lora=LoraConfig(rank=2),
        threads=1,
    )
    trainer = alignpro.run_train(config)
    assert trainer.log is not None
    record = json.loads((tmp_path / "kind" / "reward.json").read_text())
    record["bias"] += 1
    (tmp_path / "kind" / "reward.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"cannot resume: reward learned:.*/kind: not what"):
        alignpro.run_train(config, resume=True)


def test_the_longest_row_that_is_said_to_fit_is_scored(made):
    reward, answer = build_reward(f"learned:{made / 'kind'}"), "be kind and warm"
    written = len(reward.model.tokenizer.encode(answer))
    unread = rewards_unread_by([reward], SamplingParams(max_new_tokens=written))
    refused = []
    for count in range(20, reward.model.context_length):
        prompt = "why " * count
        refused.append(unread(prompt, {}) is not None)
        try:
            reward([prompt], [""], [answer])
        except ValueError as error:
            assert refused[-1] and "exceed the context" in str(error)
        else:
            assert refused.count(True) <= 2  # what it reads behind an answer is not of one length
    assert {True, False} == set(refused)
    assert unread("why " * 999, {}).startswith(f"for reward 'learned:{made / 'kind'}': ")


def test_a_configuration_that_names_it(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    words = ["init", tmp_path / "mine.yaml", "--data", "pairs.jsonl", "--model", made / "model"]
    invoke(*words, "--reward", "learned:kind")
    assert "reward: learned:kind" in (tmp_path / "mine.yaml").read_text().replace('"', "")
    assert not (made / "learned.py").exists()  # it is no module of the user's


def test_a_reward_is_written_whole_or_not_at_all(made, tmp_path, monkeypatch):
    """Killed as it is written, the same command does it in the same folder."""

    def killed(*given):
        raise KeyboardInterrupt

    config = from_mapping(
        RewardFitConfig,
        {"model": str(made / "model"), "data": str(made / "pairs.jsonl"), "folds": 2},
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignpro.train.reward_fit.write_json", killed)
        run_reward_fit(config, tmp_path / "kind")
    run_reward_fit(config, tmp_path / "kind")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["kind", "reward.json"]


def test_what_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing: expected the folder of a learned"):
        build_reward(f"learned:{tmp_path / 'nothing'}")
    (tmp_path / "torn").mkdir()
    whole = (made / "kind" / "reward.json").read_text()
    for text in (whole[:50], "[]", "{}"):
        (tmp_path / "torn" / "reward.json").write_text(text)
        with pytest.raises(ValueError, match=r"reward\.json: damaged or of another version"):
            build_reward(f"learned:{tmp_path / 'torn'}")
    record = json.loads(whole)
    record["model"]["fingerprint"] = "0"
    (tmp_path / "torn" / "reward.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"fitted to .* with other weights than"):
        build_reward(f"learned:{tmp_path / 'torn'}")
    reward = build_reward(f"learned:{made / 'kind'}")
    limit = reward.model.context_length
    with pytest.raises(ValueError, match=rf"tokens of prompt and answer exceed .* \({limit} tok"):
        reward(["why"], [""], ["no " * limit])
    pairs = made / "pairs.jsonl"
    line = invoke("reward", "fit", pairs, "--output", made / "kind", code=2)
    assert "kind: is not empty; name another folder" in line
    line = invoke("reward", "fit", pairs, "model.adapter=x", code=2)
    assert "model.adapter: expected null: the states are the base model's" in line
    short = [f"model={made / 'model'}", "model.context_length=12", "--output", tmp_path / "o"]
    line = invoke("reward", "fit", pairs, *short, code=2)
    assert "pairs.jsonl, line 1: " in line and "exceed the context" in line
    assert not (tmp_path / "o").exists()
    rows = [{"prompt": "why " * 300, "chosen": "b", "rejected": "c"}]
    rows += [{"prompt": f"why {i}", "chosen": "b", "rejected": "c"} for i in range(12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = [f"model={made / 'model'}", "model.context_length=120", "folds=2", "on_too_long=skip"]
    invoke("reward", "fit", tmp_path / "long.jsonl", *short, "--output", tmp_path / "some")
    record = json.loads((tmp_path / "some" / "reward.json").read_text())
    assert record["training"]["pairs"] + record["heldout"]["pairs"] == 12
    with pytest.raises(ValueError, match="strengths: expected at least one"):
        from_mapping(RewardFitConfig, {"strengths": []})
    with pytest.raises(ValueError, match="config: expected RewardFitConfig, got Pref"):
        run_reward_fit(PreferencesConfig(), tmp_path / "o")
