"""Self-improvement: the optimum of a round, candidates by sentence, runs that go on to the bit."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import LoraConfig, ModelConfig, SelfImproveConfig, from_mapping
from alignpro.config.data import DataConfig
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import load_model
from alignpro.objective.preference import dpo_loss
from alignpro.price.fit import price_fit
from alignpro.report.self_improve import round_line, rounds_view
from alignpro.rewards import build_reward, from_callable
from alignpro.rewards.scenes import SceneCounts
from alignpro.run_directory import open_run_dir
from alignpro.statistics import relative_reduction
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy
from alignpro.train.self_improve import SelfImprovement, run_self_improve
from alignpro.train.self_measure import MeasuredAnswer, round_warnings, summarise
from alignpro.train.sentence_search import (
    Answer,
    Candidates,
    next_sentences,
    path_score,
    search_answers,
)
from alignpro.train.sentences import sentence_end
from alignpro.types import SamplingParams
from chat_server import ChatServer, Fault

LONG = SamplingParams(max_new_tokens=150, temperature=1.0)


def test_the_gradient_of_a_round_is_zero_at_the_tilted_policy():
    """Of pairs that follow Bradley and Terry, drawn from the policy before: every pair of answers
    weighed by how often it is drawn, and chosen."""
    before = np.array([0.5, 0.3, 0.2])
    rewards, alpha = np.array([0.0, 0.2, 0.6]), 0.5
    best = torch.log_softmax(torch.tensor(np.log(before) + rewards / alpha), dim=0)
    best.requires_grad_()
    reference = torch.tensor(np.log(before))
    first, second = torch.tensor(list(itertools.permutations(range(3), 2))).T
    prefer = torch.sigmoid(torch.tensor(rewards)[first] - torch.tensor(rewards)[second])
    weight = torch.tensor(before)[first] * torch.tensor(before)[second] * prefer
    for start, zero in ((best, True), (reference.clone().requires_grad_(), False)):
        logprob = torch.log_softmax(start, dim=0)
        loss = dpo_loss(
            *(logprob[first], logprob[second], reference[first], reference[second]), beta=alpha
        ).loss
        (gradient,) = torch.autograd.grad((weight * loss).sum(), start)
        assert (float(gradient.abs().max()) < 1e-12) == zero


def test_what_training_on_a_place_is_expected_to_bring():
    place = Candidates((-0.2, -0.5, -0.9), (20.0, 25.0, 22.0), (-0.9333, -0.3667, -0.7))
    weights = np.exp(np.array(place.scores) / 0.5)
    weights /= weights.sum()
    expected = float(weights @ np.array(place.calibrator)) - 67 / 3
    assert place.expected_gain(place.calibrator, 0.5) == pytest.approx(expected)
    assert place.expected_gain(place.calibrator, 1e6) == pytest.approx(0, abs=1e-5)


# --- candidates ---


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


def shorter(responses):
    return [-float(len(response)) for response in responses]


def test_a_search_scores_siblings_and_goes_on_from_the_best_and_the_worst(tiny):
    config = SelfImproveConfig(response=LONG, candidates=8, sentences=3, calibration=1.0)
    prompts = ["tell me of tides", "the red one"]
    options = (from_callable(shorter), config)
    found, places = search_answers(tiny, None, prompts, {}, *options, seed=5)
    again, _ = search_answers(tiny, None, prompts, {}, *options, seed=5)
    other, _ = search_answers(tiny, None, prompts, {}, *options, seed=6)
    assert found == again and found != other
    assert sum(len(answers) for answers in found) >= 4
    for answers in found:
        scores = [path_score(answer, config) for answer in answers]
        assert scores == sorted(scores, reverse=True)
        for answer in answers:
            assert 1 <= len(answer.sentences) == len(answer.scores) <= 3
            assert all(s.text for s in answer.sentences) and len(answer.tokens) <= 150
            assert scores[answers.index(answer)] == pytest.approx(np.mean(answer.scores))
            for sentence, score in zip(answer.sentences, answer.calibrator, strict=True):
                assert score == -len(sentence.text)
    for place in places:  # with the calibrator alone, the shortest has the highest score
        best = int(np.argmax(place.scores))
        assert place.calibrator[best] == max(place.calibrator)
    begun = {answer.sentences[0].text for answer in found[0]}
    assert len(begun) >= 2


def test_a_prompts_draws_do_not_depend_on_the_others(tiny):
    config = SelfImproveConfig(response=LONG, candidates=6, sentences=2)
    reward = from_callable(shorter)
    alone, _ = search_answers(tiny, None, ["tides"], {}, reward, config, seed=5)
    both, _ = search_answers(tiny, None, ["tides", "roofs"], {}, reward, config, seed=5)
    assert both[0] == alone[0]


def test_a_sentence_is_what_an_answer_that_was_not_stopped_begins_with(smollm2):
    """Of a real model: the tokens of a sentence are the first of an uninterrupted draw."""
    from alignpro.train.sentence_search import _Request

    tokens = smollm2.tokenizer.encode_chat(
        [{"role": "user", "content": "Name three fruits, e.g. an apple of 1.5 pounds, and why."}]
    )
    params = SamplingParams(max_new_tokens=60, temperature=0.7, seed=11)
    requests = [_Request(tokens, params, sample) for sample in range(4)]
    found = next_sentences(smollm2, None, requests)
    whole = smollm2.generate([tokens], replace(params, n=4))
    whole_sentences = 0
    for sentence, completion in zip(found, whole, strict=True):
        if sentence is None:
            assert completion.finish_reason == "length"
            continue
        count = len(sentence.tokens)
        assert list(sentence.tokens) == completion.tokens[:count]
        assert list(sentence.logprobs) == completion.logprobs[:count]
        end = sentence_end(completion.text + " \n")
        assert completion.text[:end].strip() == sentence.text
        whole_sentences += 1
    assert whole_sentences >= 2


# --- what is measured ---


def measured(prompt, confidence, scene=None, tokens=10):
    numbers = {"grounding": 0.1 * prompt, "kl_first": 1.0, "kl_previous": 0.5, "entropy": 2.0}
    numbers["copied"] = 0.1
    return MeasuredAnswer(prompt, "y", "", tokens, confidence, **numbers, scene=scene)


def test_a_round_is_summed_up_against_the_first():
    first = [measured(i, -1.0 - 0.1 * i, SceneCounts(4, 2, 2)) for i in range(4)]
    now = [measured(i, -0.5 - 0.1 * i, SceneCounts(4, i % 2, 2)) for i in range(4)]
    row = summarise(now, first, 4, 0)
    assert row["confidence"] == pytest.approx(-0.65) and row["kl_first"] == 1.0
    assert row["chair"] == {"per_mention": 2 / 16, "per_description": 0.5, "true_objects": 2.0}
    assert row["change"]["confidence"] == pytest.approx([0.5, 0.5, 0.5])
    assert row["change"]["faithfulness"][0] == pytest.approx(0.5 - 0.125)
    assert row["change"]["chair_i_reduction"][0] == pytest.approx(0.75)
    assert row["change"]["chair_s_reduction"][0] == pytest.approx(0.5)
    assert round_warnings(row) == {}
    json.dumps(row)


@pytest.mark.parametrize("common", [0, 1, 2])
def test_prompts_without_an_answer_are_left_out_and_counted(common):
    first = [measured(i, -1.0, SceneCounts(4, 2, 2)) for i in range(3)]
    now = [measured(i + 3 - common, -0.5, SceneCounts(4, 1, 2)) for i in range(3)]
    row = summarise(now, first, 6, 0)
    assert (row["answers"], row["failed"], row["compared"]) == (3, 3, common)
    assert row["confidence"] == -0.5 and row["confidence_ci"] == [-0.5] * 3
    alone = summarise(now[:1], first, 6, 0)
    assert alone["confidence_ci"] is None and alone["change"]["tokens"] is None
    changed = [0.5] * 3 if common == 2 else None
    assert row["change"]["confidence"] == changed and row["chair"]["per_mention"] == 0.25
    assert ("chair_i_reduction" in row["change"]) == (common == 2)
    said = round_warnings(row)["unanswered"]
    assert said.startswith("3 of 6 measured prompts have no answer")
    assert ("too few for an interval" in said) == (common < 2)
    json.dumps(row, allow_nan=False)


def test_self_confidence_alone_is_warned_of():
    first = [measured(i, -1.0 - 0.1 * i) for i in range(4)]
    risen = [replace(a, confidence=a.confidence + 0.3) for a in first]
    assert set(round_warnings(summarise(risen, first, 4, 0))) == {"self_confidence"}
    grounded = [replace(a, grounding=a.grounding + 0.2) for a in risen]
    assert round_warnings(summarise(grounded, first, 4, 0)) == {}
    copies = [replace(a, copied=0.8) for a in first]
    said = round_warnings(summarise(copies, first, 4, 0))
    assert said["copies"].startswith("80% of the answers' words repeat their source, 10% of")
    cut = [replace(a, tokens=7) for a in first]
    assert set(round_warnings(summarise(cut, first, 4, 0))) == {"shorter"}


def test_a_relative_reduction_by_hand():
    found = relative_reduction([1, 0], [4, 4], [2, 2], [4, 4])
    assert found.mean == pytest.approx(0.75) and found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="control: expected a ratio above 0"):
        relative_reduction([1, 0], [1, 1], [0, 0], [1, 1])


# --- runs ---

WORDS = ["the heron", "a tin roof", "the other hand", "in the rain", "the red one", "tides"]


@pytest.fixture
def place(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    rows = [{"prompt": f"{words}. tell me", "source": f"{words}."} for words in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(place, **changes):
    given = {
        "prompter": ModelConfig(str(place / "model")),
        "data": DataConfig("rows.jsonl"),
        "run_dir": str(place / "run"),
        "iterations": 2,
        "candidates": 6,
        "sentences": 2,
        "response": LONG,
        "steps": 3,
        "batch_size": 4,
        "checkpoint_every": 1,
        "learning_rate": 1e-2,
        "lora": LoraConfig(rank=2),
        "threads": 1,
    }
    return SelfImproveConfig(**{**given, **changes})


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "changes",
    [{"policy": "target"}, {"policy": "prompter"}, {"policy": "target", "reference": "first"}],
    ids=["target", "prompter", "first"],
)
def test_rounds_go_on_to_the_bit(place, changes):
    whole = run_self_improve(settings(place, run_dir=str(place / "whole"), **changes))
    steps = []

    def stop(row):
        steps.append(row["step"])
        if len(steps) == 5:  # the second step of the second round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"in round 2; .* alignpro self-improve .*--resume"):
        run_self_improve(settings(place, **changes), on_step=stop)
    shutil.rmtree(place / "run" / "round-02" / "checkpoints" / "step-000002")  # as kill -9 does
    told = []
    parts = run_self_improve(
        settings(place, **changes), resume=True, on_step=steps.append, on_round=told.append
    )
    assert [row["step"] for row in steps[5:]] == [1, 2]
    assert [row["round"] for row in told] == [0, 1, 2] and told == parts
    assert without_seconds(whole) == without_seconds(parts)
    for name in ("pairs-01.jsonl", "pairs-02.jsonl", "measured-02.jsonl"):
        files = [(place / run / name).read_text() for run in ("whole", "run")]
        assert files[0] == files[1] and files[0]
    for name in ("round-01/adapter", "adapter"):
        model = load_model(place / "model", threads=1)
        one, other = (model.load_adapter(place / run / name) for run in ("whole", "run"))
        for module, pair in one.matrices.items():
            assert all(map(np.array_equal, pair, other.matrices[module]))
    first, second, third = (row["measured"] for row in whole)
    assert first["kl_first"] == first["kl_previous"] == 0.0
    assert second["kl_first"] == second["kl_previous"] > 0
    assert third["kl_first"] > 0 and third["kl_previous"] != third["kl_first"]
    trained = [read_metrics(place / "whole" / f"round-0{n}" / "metrics.jsonl") for n in (1, 2)]
    assert trained[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-9)
    held_to_before = changes.get("reference") != "first"
    assert (abs(trained[1][0]["margin"]) < 1e-12) == held_to_before
    beta = whole[2]["beta_to_first"]
    assert beta == pytest.approx(0.05 if held_to_before else 0.1)
    with pytest.raises(ValueError, match=r"calibration was 0\.9, is 0\.5"):
        run_self_improve(settings(place, calibration=0.5, **changes), resume=True)


@pytest.mark.parametrize("policy", ["target", "prompter"])
def test_no_step_holds_more_than_a_dry_run_says(place, policy, monkeypatch):
    held, score = [], LoraPolicy.score

    def scored(self, sequences, starts, *, activations="keep", **options):
        held.append(self.score_bytes(sequences, starts, activations, with_reference=False))
        return score(self, sequences, starts, activations=activations, **options)

    config = settings(place, policy=policy, iterations=1)
    said = price_fit(config)
    assert not (place / "run").exists()
    monkeypatch.setattr(LoraPolicy, "score", scored)
    run_self_improve(config)
    most = said["memory"]["scoring (memory_limit bounds it)"]
    assert most / 4 < max(held) <= most
    assert said["memory_bytes"] == sum(said["memory"].values())


def test_more_rounds_later_and_a_run_that_is_overwritten(place):
    run_self_improve(settings(place, iterations=1))
    rows = run_self_improve(settings(place, iterations=2), resume=True)
    assert [row["round"] for row in rows] == [0, 1, 2]
    with pytest.raises(FileExistsError, match="--overwrite deletes it"):
        run_self_improve(settings(place))
    open_run_dir(place / "run", overwrite=True)
    assert not list((place / "run").glob("round-*")) and not list((place / "run").glob("*.jsonl"))


@pytest.mark.parametrize(("epochs", "batch"), [(1, 2), (2, 4), (1, 99)])
def test_the_steps_of_a_round_are_of_its_pairs(place, epochs, batch):
    rows = run_self_improve(
        settings(place, iterations=1, steps=99, epochs=epochs, batch_size=batch, learning_rate=1e-4)
    )
    pairs = rows[1]["search"]["pairs"]
    steps = read_metrics(place / "run" / "round-01" / "metrics.jsonl")
    assert 1 < pairs < 99
    assert len(steps) == math.ceil(epochs * pairs / min(batch, pairs))


def test_candidates_that_agree_end_the_rounds(place, monkeypatch, caplog):
    found = SelfImprovement._of_answers

    def agreeing(self, adapter, seed):
        pairs, places = found(self, adapter, seed)
        return ([] if adapter is not None else pairs), places

    monkeypatch.setattr(SelfImprovement, "_of_answers", agreeing)
    rows = run_self_improve(settings(place, iterations=3, steps=1))
    assert [row["round"] for row in rows] == [0, 1]
    assert "that differ and have scores: the run ends with round 1" in caplog.text
    assert (place / "run" / "adapter" / "adapter_config.json").exists()
    assert run_self_improve(settings(place, iterations=3, steps=1), resume=True) == rows
    monkeypatch.setattr(SelfImprovement, "_of_answers", lambda self, adapter, seed: ([], []))
    with pytest.raises(ValueError, match=r"round 1: no pairs, .* have scores; more candidates"):
        run_self_improve(settings(place, run_dir=str(place / "none")))


def test_the_command_and_an_evaluation_of_its_run(place):
    def invoke(*words, code=0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result.output

    words = [f"prompter={place / 'model'}", "data=rows.jsonl", "threads=1", "steps=1"]
    words += ["iterations=1", "candidates=3", "sentences=1", "lora.rank=2", "scale=z"]
    words += ["response.max_new_tokens=60", "response.temperature=1.0", "batch_size=2"]
    words += ["calibrator=0.5*grounding+confidence", f"run_dir={place / 'run'}"]
    said = invoke("self-improve", *words)
    assert "round 0: grounding" in said and f"adapter: {place / 'run' / 'adapter'}" in said
    short = ["response.max_new_tokens=3", "num_rewrites=1", "data.split=train", "threads=1"]
    invoke("evaluate", "--run", place / "run", "num_prompts=2", "reward=grounding", *short)
    assert "tuned" in json.loads((place / "run" / "evaluation.json").read_text())["arms"]
    invoke("generate", "Why?", "--run", place / "run", "--max-new-tokens", "2", "--threads", "1")
    again = invoke("self-improve", place / "run" / "config.json", "--resume")
    assert "round 1: grounding" in again


def telling(words, logprobs=(-0.5, -1.0)):
    """A reply with the log-probabilities of its tokens."""
    reply = json.loads(Fault.reply(words, usage=(5, 2)).body)
    of_tokens = [{"token": "x", "logprob": logprob} for logprob in logprobs]
    reply["choices"][0]["logprobs"] = {"content": of_tokens}
    return Fault(body=json.dumps(reply))


def endpoint_settings(place, server, **changes):
    client = {"logprobs": True, "max_retries": 0}
    target = {"model": "big", "endpoint": server.url, "client": client, "max_failed": 0.5}
    given = {"policy": "prompter", "calibrator": "vader", "steps": 1, "iterations": 1}
    given["measured"] = from_mapping(SelfImproveConfig, {"measured": {"num_prompts": 2}}).measured
    return settings(place, **given, target=from_mapping(ModelConfig, target), **changes)


def test_an_endpoint_that_fails_while_it_is_measured(place, monkeypatch):
    """One of two prompts has no answer, and another one in the next round."""
    monkeypatch.setattr("alignpro.models.http_client._FIRST_PAUSE", 0.01)
    failing, measuring = [WORDS[0]], []
    measure = SelfImprovement._measure

    def noted(self, number):
        measuring.append(number)
        failing[:] = [WORDS[number % 2]]
        try:
            return measure(self, number)
        finally:
            failing.clear()

    monkeypatch.setattr(SelfImprovement, "_measure", noted)

    def answer(asked):
        if any(asked.turn.startswith(words) for words in failing):
            return Fault.error(500, "no")
        return telling("a good " + asked.turn[-3:])

    with ChatServer(answer) as server:
        rows = run_self_improve(endpoint_settings(place, server))
        assert [row["measured"]["answers"] for row in rows] == [1, 1] and measuring == [0, 1]
        assert [row["measured"]["failed"] for row in rows] == [1, 1]
        assert rows[1]["measured"]["compared"] == 0
        assert rows[1]["measured"]["change"]["confidence"] is None
        assert "too few for an interval" in rows[1]["warnings"]["unanswered"]
        rounds_view(rows)
        assert round_line(rows[1]).startswith("round 1: grounding")
        assert (place / "run" / "adapter" / "adapter_config.json").exists()
        assert run_self_improve(endpoint_settings(place, server), resume=True) == rows


def test_an_endpoint_that_is_down_ends_in_a_line_and_is_gone_on_with(place, monkeypatch):
    monkeypatch.setattr("alignpro.models.http_client._FIRST_PAUSE", 0.01)
    down = [False]
    measure = SelfImprovement._measure

    def noted(self, number):
        down[0] = number == 1
        return measure(self, number)

    monkeypatch.setattr(SelfImprovement, "_measure", noted)
    error = Fault.error(500, "no")
    with ChatServer(lambda asked: error if down[0] else telling("good")) as server:
        config = endpoint_settings(place, server)
        with pytest.raises(FailedRowsError, match="2 of 2 responses failed"):
            run_self_improve(config)
        assert [row["round"] for row in read_metrics(place / "run" / "rounds.jsonl")] == [0]
        monkeypatch.setattr(SelfImprovement, "_measure", measure)
        down[0], steps = False, []
        rows = run_self_improve(config, resume=True, on_step=steps.append)
        assert len(rows) == 2 and steps == []
        assert rows[1]["measured"]["failed"] == 0


def test_answers_without_log_probabilities_have_no_confidence(place):
    told = telling("good")
    with ChatServer(lambda asked: told if "tin" in asked.turn else telling("good", ())) as server:
        config = endpoint_settings(place, server)
        row, _ = run_self_improve(config)
        assert (row["measured"]["answers"], row["measured"]["failed"]) == (1, 1)
        assert row["measured"]["confidence"] == -0.75
        told = telling("good", ())
        with pytest.raises(FailedRowsError, match="target: none of 2 answers came with log-prob"):
            run_self_improve(replace(config, run_dir=str(place / "silent")))


def test_raw_is_warned_of(place):
    rows = run_self_improve(
        settings(place, scale="raw", iterations=1, steps=1, calibrator="my_own:hundreds")
        if (place / "my_own.py").write_text("def hundreds(responses):\n"
            "    return [100.0 * len(r) for r in responses]\n") else None
    )  # fmt: skip
    assert "adds up what is not on one scale" in rows[1]["warnings"]["raw"]
    assert rows[1]["search"]["spread_ratio"] > 1000


def test_what_is_refused(place):
    for mapping, said in (
        ({"keep": [1]}, r"keep: expected two numbers: of best and of worst, got \[1\]"),
        ({"candidates": 1}, "candidates: expected at least 2"),
        ({"calibration": 1.5}, "calibration: expected from 0 to 1"),
        ({"response": {"top_k": 5}}, "response.top_k: expected 0: confidence is the log-prob"),
        ({"response": {"stop": ["."]}}, "response.stop: expected none"),
        ({"prompter": {"adapter": "a"}}, "prompter.adapter: expected null"),
        ({"target": {"compute": "int8"}}, "target.compute: expected float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            from_mapping(SelfImproveConfig, mapping)
    with pytest.raises(ValueError, match="needs the data column 'objects'"):
        run_self_improve(settings(place, calibrator="chair"))
    endpoint = ModelConfig("big", endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="big tells no log-probabilities of what it writes"):
        run_self_improve(settings(place, policy="prompter", target=endpoint, calibrator="topic"))
    rows = [{"prompt": f"say {word}", "objects": word} for word in ("dog", "ball")]
    (place / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="'objects', row 0: expected a list of texts, got 'dog'"):
        run_self_improve(settings(place, data=DataConfig("o.jsonl", split=None)))
    with pytest.raises(ValueError, match="measured: expected 2 or more prompts"):
        run_self_improve(settings(place, num_prompts=1))
    assert not (place / "run").exists()


def test_an_answer_without_sentences_has_nothing():
    assert Answer().text == "" and Answer().tokens == [] and not Answer().ended
    assert build_reward("grounding").name == "grounding"
