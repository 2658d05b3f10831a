"""Preference training: on the enumerable model by hand and to its optimum, on the engine to the
bit."""

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
from alignpro.config import (
    AnchorConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PreferConfig,
    PreferencesConfig,
    Prompting,
    SftConfig,
    from_mapping,
)
from alignpro.config.prefer import HeldOutPairsConfig
from alignpro.data.preferences import PreferenceRow
from alignpro.models.adapter import load_peft, save_peft
from alignpro.models.native_model import load_model
from alignpro.objective.preference import dpo_loss
from alignpro.prompter import Prompter
from alignpro.train.metrics import METRICS, read_metrics
from alignpro.train.policy import LoraPolicy
from alignpro.train.preference import encode_preference, preference_fit
from alignpro.train.run import run_prefer, run_sft
from native_runs import lora
from train.toy_model import EOS, GEN, MODULE, VOCABULARY, ToyModel, ToyTokenizer

PLAIN = Prompting(template="{prompt}")
ROWS = [
    PreferenceRow("ab", "c", "d"),
    PreferenceRow("d", "ce", "a"),
    PreferenceRow("a", "e", "c"),
    PreferenceRow("b", "", "hh"),
]


def config(**changes):
    defaults = {"steps": 1, "batch_size": 4, "prompting": PLAIN, "learning_rate": 0.05}
    defaults["max_grad_norm"] = 1e6  # gradients as they are
    return PreferConfig(**{**defaults, **changes})


def toy_policy(seed=1, hidden_size=6, rank=2):
    """Away from its base, so that rewards are not 0."""
    policy = LoraPolicy.fresh(ToyModel(hidden_size=hidden_size), LoraConfig(rank=rank), seed=0)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            policy.lora_b[0].normal_(std=0.3, generator=generator)
    return policy


def run(rows=ROWS, policy=None, **changes):
    """The first step's row, and the gradients that it was taken by."""
    policy = toy_policy() if policy is None else policy
    row = next(preference_fit(policy, rows, config(**changes)).rows())
    return row, [p.grad.clone() for p in policy.parameters()]


def by_hand(policy, rows, beta=0.1, label_smoothing=0.0, chosen_nll=0.0):
    """The loss and its gradients by the table, and torch alone."""
    core = policy.model.core_model
    a, b = (m[0].detach().clone().requires_grad_() for m in (policy.lora_a, policy.lora_b))
    scale = policy.weights().scale
    mine = torch.log_softmax(core.hidden @ (core.weight + scale * (b @ a)).T, dim=-1).double()
    frozen = core.table(None, 1.0).double()

    def logprob(table, text):
        tokens = [GEN, *ToyTokenizer().encode(text), EOS]
        return sum(table[i, j] for i, j in itertools.pairwise(tokens))

    def all_of(table, side):
        return torch.stack([logprob(table, getattr(row, side)) for row in rows])

    chosen = all_of(mine, "chosen")
    result = dpo_loss(
        chosen,
        all_of(mine, "rejected"),
        all_of(frozen, "chosen"),
        all_of(frozen, "rejected"),
        beta=beta,
        label_smoothing=label_smoothing,
    )
    lengths = torch.tensor([len(row.chosen) + 1 for row in rows])
    loss = result.loss.mean() - chosen_nll * (chosen / lengths).mean()
    loss.backward()
    return loss.item(), result, [a.grad, b.grad]


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"chosen_nll": 0.5}]
)
def test_loss_metrics_and_gradient_by_the_table(options):
    loss, result, gradients = by_hand(toy_policy(), ROWS, **options)
    row, found = run(**options)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["margin"] == pytest.approx(result.margin.mean().item(), rel=1e-4)
    assert row["accuracy"] == result.correct.mean().item()
    assert row["chosen_reward"] == pytest.approx(result.chosen_reward.mean().item(), rel=1e-4)
    assert row["rejected_reward"] == pytest.approx(result.rejected_reward.mean().item(), rel=1e-4)
    assert (row["chosen_tokens"], row["rejected_tokens"], row["tokens"]) == (2.0, 2.25, 17)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert set(row) - {"step", "chosen_nll"} <= set(METRICS)


def test_the_first_step_is_log_2_exactly():
    row, _ = run(policy=toy_policy(seed=0))
    assert (row["loss"], row["margin"], row["accuracy"]) == (math.log(2), 0.0, 0.5)
    assert row["chosen_logprob"] < 0 and row["rejected_logprob"] < 0


def test_swapped_pairs_flip_the_gradient():
    swapped = [replace(r, chosen=r.rejected, rejected=r.chosen) for r in ROWS]
    _, (_, there) = run(policy=toy_policy(seed=0))
    row, (_, back) = run(swapped, policy=toy_policy(seed=0))
    assert row["loss"] == math.log(2)
    torch.testing.assert_close(there, -back, rtol=1e-5, atol=1e-9)
    assert there.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "micro_batches", "mode"),
    [
        ({"micro_batch_size": 1}, 4, "keep"),
        ({"micro_batch_size": 3}, 2, "keep"),
        ({"memory_limit": 2200}, 2, "keep"),  # 100 bytes a token, and 8 to 11 tokens a pair
        ({"memory_limit": 1200, "activations": "recompute"}, 2, "recompute"),  # 40 bytes a token
    ],
)
def test_micro_batches_of_whole_pairs_change_neither_loss_nor_gradient(
    changes, micro_batches, mode
):
    whole, gradients = run()
    policy = toy_policy()
    row, parts = run(policy=policy, **changes)
    assert row["micro_batches"] == micro_batches and whole["micro_batches"] == 1
    trained = [score for score in policy.model.core_model.scores if score.received]
    assert len(trained) == micro_batches and {s.activations for s in trained} == {mode}
    assert all(len(score.sequences) % 2 == 0 for score in trained)
    for name in ("loss", "margin", "accuracy", "chosen_logprob", "grad_norm"):
        assert row[name] == pytest.approx(whole[name], rel=1e-5)
    for mine, theirs in zip(parts, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_a_pair_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match=r"sequence 0: scoring its .* tokens alone takes"):
        run(memory_limit=300)


def test_the_reference_is_looked_up_once_and_stays():
    policy = toy_policy()
    frozen = toy_policy(seed=3).weights()
    fit = preference_fit(policy, ROWS, config(steps=6), reference=frozen)
    first, *_, last = fit.rows()
    b = frozen.matrices[MODULE][1]
    adapter = next(made for made in policy.model.adapters if np.array_equal(made.b, b))
    asked = [score for score in policy.model.core_model.scores if score.adapter is adapter]
    assert sum(len(score.sequences) for score in asked) == 2 * len(ROWS)
    assert first["margin"] != 0 and last["loss"] < first["loss"]
    start, _ = run(policy=LoraPolicy(ToyModel(), frozen))  # held to the base, not to itself
    assert start["margin"] != 0


def test_training_reaches_the_optimum_of_the_objective():
    """Answers "a" to "d", preferred as Bradley and Terry's model has it: the policy ends at
    pi_ref exp(R / beta), up to what no pair compares."""
    rewards, beta, scale = {"a": 0.0, "b": 0.4, "c": 1.0, "d": -0.6}, 0.5, 40
    rows = [
        PreferenceRow("e", one, other)
        for one, other in itertools.permutations(rewards, 2)
        for _ in range(round(scale / (1 + math.exp(rewards[other] - rewards[one]))))
    ]
    policy = toy_policy(seed=0, hidden_size=VOCABULARY, rank=8)
    settings = config(steps=400, batch_size=len(rows), beta=beta, lr_schedule="linear")
    last = list(preference_fit(policy, rows, settings).rows())[-1]
    mine = policy.model.core_model.table(policy.core_adapter(), 1.0).detach()
    frozen = policy.model.core_model.table(None, 1.0)
    tokens = [3 + "abcdefgh".index(answer) for answer in rewards]
    log_ratio = [
        (mine - frozen)[GEN, token].item() + (mine - frozen)[token, EOS].item() for token in tokens
    ]
    implicit = torch.tensor([beta * (value - log_ratio[0]) for value in log_ratio])
    # Whole pairs stand for shares of 40, so the odds are within 1/40 of the model's.
    torch.testing.assert_close(implicit, torch.tensor([*rewards.values()]), rtol=0, atol=0.05)
    floor = (
        -sum(
            p * math.log(p)
            for one, other in itertools.permutations(rewards, 2)
            for p in [1 / (1 + math.exp(rewards[other] - rewards[one]))]
        )
        / 6
    )
    assert last["loss"] == pytest.approx(floor, abs=0.005)


def test_what_is_read_and_written():
    tokenizer_of = ToyModel()
    row = PreferenceRow("ab", " c", "")
    for policy, template in (("prompter", Prompting(template="d{prompt}")), ("target", PLAIN)):
        settings = config(policy=policy, prompting=template)
        pair = encode_preference(tokenizer_of, row, settings, EOS)
        read = [0, *([6] if policy == "prompter" else []), 3, 4, GEN]
        assert [e.tokens for e in pair.policy] == [[*read, 5, EOS], [*read, EOS]]
        assert {e.start for e in pair.policy} == {len(read)} and pair.reference == pair.policy
    marked = replace(row, columns={"safe_prompt": "h"})
    pair = encode_preference(tokenizer_of, marked, config(anchor=AnchorConfig()), EOS)
    assert [e.tokens for e in pair.reference] == [[0, 10, GEN, 5, EOS], [0, 10, GEN, EOS]]


def test_both_answers_stand_behind_the_same_history():
    """What the longer one leaves of the context is what both have."""
    from alignpro.types import Conversation

    prompt = Conversation(tuple(("user", "a" * 12) for _ in range(3)), "b")
    row = PreferenceRow(prompt, "c" * 20, "d")
    settings = config(prompting=Prompting(template="{prompt}", history_template="{history}"))
    toy = ToyModel()
    toy.tokenizer.encode = lambda text, most=None: (
        [3] * len(text)
    )  # a transcript has other characters
    pair = encode_preference(toy, row, settings, EOS)
    chosen, rejected = pair.policy
    assert chosen.tokens[: chosen.start] == rejected.tokens[: rejected.start]
    assert len(chosen.tokens) <= toy.context_length
    alone = encode_preference(toy, replace(row, chosen="c"), settings, EOS)
    assert alone.policy[0].start > chosen.start


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "pairs: expected at least one"),
        ([ROWS[0], PreferenceRow("a" * 70, "b", "c", place="x.csv, line 3")], "x.csv, line 3: 74"),
        ([PreferenceRow("a", "b", "c" * 70)], "pair 0: 74 tokens exceed the context of 64"),
    ],
)
def test_bad_pairs_are_named(rows, line):
    with pytest.raises(ValueError, match=line):
        preference_fit(toy_policy(), rows, config())


# --- on the engine ---

WORDS = ["the heron", "a tin roof", "on the other hand", "in the rain", "the red one", "tides"]


@pytest.fixture
def place(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    rows = [
        {
            "prompt": f"tell me about {words}",
            "chosen": "be kind",
            "rejected": "be short and cold",
            "safe": "tell me about birds" if i == 1 else None,
            "split": "validation" if i > 3 else "train",
        }
        for i, words in enumerate(WORDS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(place, **changes):
    given = {
        "prompter": ModelConfig(str(place / "model")),
        "data": PreferencesConfig("pairs.jsonl"),
        "run_dir": str(place / "run"),
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "learning_rate": 1e-2,
        "lora": LoraConfig(rank=2),
        "prompting": Prompting(template="say {prompt}"),
        "threads": 1,
    }
    return PreferConfig(**{**given, **changes})


@pytest.mark.parametrize("policy", ["prompter", "target"])
def test_a_run_begins_at_log_2_and_goes_on_to_the_bit(place, policy):
    watched = HeldOutPairsConfig(every=4, num_prompts=2)
    common = {"policy": policy, "heldout": watched}
    whole = run_prefer(settings(place, run_dir=str(place / "whole"), **common))

    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"after step 3; go on with: alignpro prefer .* --"):
        run_prefer(settings(place, **common), on_step=stop)
    shutil.rmtree(place / "run" / "checkpoints" / "step-000003")  # as kill -9 leaves it
    seen = []
    parts = run_prefer(settings(place, **common), resume=True, on_step=seen.append)
    assert [row["step"] for row in seen] == [2, 3, 4, 5]
    for name, pair in whole.matrices.items():
        assert all(map(np.array_equal, pair, parts.matrices[name]))
    logs = [read_metrics(place / name / "metrics.jsonl") for name in ("whole", "run")]
    for rows in logs:
        for row in rows:
            del row["seconds"]
    assert logs[0] == logs[1]
    rows = logs[0]
    assert (rows[0]["loss"], rows[0]["margin"], rows[0]["accuracy"]) == (math.log(2), 0.0, 0.5)
    assert [row["step"] for row in rows if "heldout" in row] == [0, 4, 5]
    assert rows[0]["heldout"]["loss"] == math.log(2)
    assert rows[5]["heldout"]["accuracy_ci95"] == pytest.approx([0.025**0.5, 1.0])  # of two
    assert rows[5]["heldout"]["accuracy"] == 1.0 and rows[5]["loss"] < 0.9 * math.log(2)
    with pytest.raises(ValueError, match=r"beta was 0\.1, is 0\.2"):
        run_prefer(settings(place, beta=0.2, **common), resume=True)
    with pytest.raises(
        ValueError, match=r"run: a run of `alignpro prefer`, expected one of `alignpro sft`$"
    ):
        run_sft(SftConfig(run_dir=str(place / "run")), resume=True)
    of_another = ["self-improve", str(place / "run" / "config.json"), "--resume"]
    assert "a run of `alignpro prefer`" in CliRunner().invoke(app, of_another).output


def test_an_adapter_to_start_from_is_the_reference(place):
    model = load_model(place / "model", threads=1)
    save_peft(place / "start", lora(model, seed=5))
    start = ModelConfig(str(place / "model"), adapter=str(place / "start"))
    run_prefer(settings(place, prompter=start, steps=2))
    row, _ = read_metrics(place / "run" / "metrics.jsonl")
    assert (row["loss"], row["margin"]) == (math.log(2), 0.0)
    kept = load_peft(place / "run" / "reference", model.lora_modules)
    for name, (a, _) in lora(model, seed=5).matrices.items():
        assert np.array_equal(kept.matrices[name][0], a)
    shutil.rmtree(place / "start")  # a resume has its own
    run_prefer(settings(place, prompter=start, steps=3), resume=True)
    with Prompter.from_run(place / "run", threads=1) as prompter:
        assert prompter.rewrite("Why?").tokens > 0


def test_the_reference_may_read_another_prompt(place):
    """E-DPO: the first loss is that of the log-probabilities behind the two prompts."""
    anchor = AnchorConfig(column="safe")
    run_prefer(settings(place, policy="target", anchor=anchor, steps=1))
    (row,) = read_metrics(place / "run" / "metrics.jsonl")
    model = load_model(place / "model", threads=1)
    tokenizer = model.tokenizer

    def logprobs(prompt):
        read = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        texts = ("be kind", "be short and cold")
        rows = [[*read, *tokenizer.encode(text), tokenizer.eos_ids[0]] for text in texts]
        parts = model.score(rows)
        return [part[len(read) - 1 :].astype(np.float64).sum() for part in parts]

    own, safe = logprobs("tell me about a tin roof"), logprobs("tell me about birds")
    margin = 0.1 * ((own[0] - safe[0]) - (own[1] - safe[1]))
    assert abs(margin) > 1e-4
    assert row["margin"] == pytest.approx(margin / 4, rel=1e-5)
    by_hand = (3 * math.log(2) + math.log1p(math.exp(-margin))) / 4
    assert row["loss"] == pytest.approx(by_hand, rel=1e-9)


def test_an_anchor_in_every_pair_or_in_none_is_refused():
    anchored = config(anchor=AnchorConfig())
    everywhere = [replace(row, columns={"safe_prompt": "h"}) for row in ROWS]
    with pytest.raises(ValueError, match="anchor: all 4 rows are marked"):
        preference_fit(toy_policy(), everywhere, anchored)
    with pytest.raises(ValueError, match="no row is marked by column 'safe_prompt'"):
        preference_fit(toy_policy(), ROWS, anchored)
    assert preference_fit(toy_policy(), [*everywhere, *ROWS], anchored)
    every = config(anchor=AnchorConfig(all_rows=True))
    assert preference_fit(toy_policy(), everywhere, every)


@pytest.mark.parametrize("how", ["error", "skip", "cut"])
def test_a_pair_that_is_too_long(place, how, caplog):
    rows = [{"prompt": "why " * 300, "chosen": "b", "rejected": "c"}] * 1
    rows += [{"prompt": f"why {i}", "chosen": "b", "rejected": "c"} for i in range(2)]
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = settings(
        place,
        data=PreferencesConfig("long.jsonl"),
        prompter=ModelConfig(str(place / "model"), context_length=120),
        on_too_long=how,
        steps=1,
    )
    if how == "error":
        with pytest.raises(ValueError, match=r"^long.jsonl, line 1: .* exceed the context of 120"):
            run_prefer(given)
        assert not (place / "run").exists()
        return
    run_prefer(given)
    assert (
        f"1 of 3 rows were too long for a model, and {'cut' if how == 'cut' else 'left out'}"
        in (caplog.text)
    )


def test_what_is_refused_before_a_model_is_loaded(place):
    def line(**changes):
        with pytest.raises(ValueError) as caught:
            run_prefer(settings(place, prompter=ModelConfig("/nowhere"), **changes))
        return str(caught.value)

    on_it = HeldOutPairsConfig(data=PreferencesConfig(path=None, split="train"), num_prompts=2)
    assert "4 of the 4 prompts (pairs.jsonl, split train) are trained on" in line(heldout=on_it)
    many = HeldOutPairsConfig(num_prompts=65)
    assert "pairs.jsonl has 2 rows, 65 asked for" in line(heldout=many)
    assert "no column 'best'" in line(data=PreferencesConfig("pairs.jsonl", chosen="best"))
    unknown = AnchorConfig(column="sfe", where="safe", prefix="Be kind: ")
    assert "expected true or false in column 'safe', got 'tell me about birds'" in line(
        anchor=unknown
    )
    with pytest.raises(ValueError, match=r"label_smoothing: expected at least 0 and below 0\.5"):
        from_mapping(PreferConfig, {"label_smoothing": 0.5})
    with pytest.raises(ValueError, match=r"prompter.adapter: expected null: target.adapter is"):
        from_mapping(PreferConfig, {"policy": "target", "prompter": {"adapter": "a"}})
    with pytest.raises(ValueError, match=r"target.compute: expected float32 or bfloat16"):
        from_mapping(PreferConfig, {"policy": "target", "target": {"compute": "int8"}})


def test_a_run_is_evaluated_as_what_it_is(place):
    """The command, and an evaluation that takes the models from the run."""

    def invoke(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output

    common = [f"prompter={place / 'model'}", "data=pairs.jsonl", "threads=1", "steps=2"]
    common += ["lora.rank=2", "batch_size=2"]
    for policy, came in (("prompter", "trained"), ("target", "tuned")):
        run = place / policy
        done = invoke("prefer", *common, f"policy={policy}", f"run_dir={run}")
        assert f"adapter: {run / 'adapter'}" in done and "preferences 2/2" in done
        short = ["rewrite.max_new_tokens=3", "response.max_new_tokens=3", "num_rewrites=1"]
        invoke("evaluate", "--run", run, "num_prompts=2", "reward=topic", "threads=1", *short)
        arms = json.loads((run / "evaluation.json").read_text())["arms"]
        assert came in arms
        assert "report" in invoke("report", run)
        invoke("generate", "Why?", "--run", run, "--max-new-tokens", "2", "--threads", "1")


def test_the_default_data_are_the_packaged():
    assert PreferConfig().data == PreferencesConfig("warm_tones")
    assert isinstance(PreferencesConfig(), DataConfig)
