"""Runs on files as users have them: columns, rows too long for a model, rows without a score."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from alignpro.config import (
    BoundConfig,
    EvalConfig,
    ExtractConfig,
    HeadroomConfig,
    PreferConfig,
    RewardFitConfig,
    SelfImproveConfig,
    SftConfig,
    TrainConfig,
    from_mapping,
    to_mapping,
)
from alignpro.evaluate.bound import run_bound
from alignpro.evaluate.extract import run_extract
from alignpro.evaluate.headroom import run_headroom
from alignpro.evaluate.run import run_evaluate
from alignpro.models import tokenizer
from alignpro.train.metrics import read_metrics
from alignpro.train.reward_fit import run_reward_fit
from alignpro.train.run import make_trainer, run_prefer, run_sft
from alignpro.train.self_improve import run_self_improve
from counting_backend import CountingBackend

LONG = "why " * 200


@pytest.fixture
def stage(tiny_model_dir, tmp_path, monkeypatch):
    """A stage on a CSV of questions, of which the third line is too long for the model."""
    monkeypatch.chdir(tmp_path)
    with open("q.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["question", "wanted", "task"])
        for question, task in (("bees?", "a"), (LONG, "a"), ("owls?", "b"), ("moss?", "a")):
            writer.writerow([question, "Be brief.", task])
    shared = {
        "prompter": {"model": str(tiny_model_dir("llama")), "context_length": 200},
        "threads": 1,
        "steps": 1,
    }
    train = {
        "prompts_per_step": 4,
        "num_rewrites": 2,
        "reward": "letter_reward:count_e",
        "rewrite": {"max_new_tokens": 4},
        "response": {"max_new_tokens": 5},
    }

    def make(cls, **changes):
        data = {"path": "q.csv", "prompt": "question"}
        if cls is TrainConfig:
            return from_mapping(cls, {**shared, **train, "data": data, **changes})
        data["instruction"] = "wanted"
        return from_mapping(cls, {**shared, "batch_size": 2, "data": data, **changes})

    return make


def test_a_row_too_long_is_named_before_anything_is_written(stage, tmp_path):
    for begin in (
        lambda: make_trainer(stage(TrainConfig)),
        lambda: run_sft(stage(SftConfig)),
    ):
        with pytest.raises(ValueError, match=r"^q.csv, line 3: .*context of .*200"):
            begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.csv"]


RECORDS = {"schema": {"path": "s.json"}, "response": {"max_new_tokens": 8}}
OWN = {"reward": "letter_reward:count_e"}
GROUNDING = {"reward": "0.5*topic+grounding"}
HARM = {**OWN, "safety": {"harm": "grounding"}}
HUGE = {
    "train": (make_trainer, TrainConfig, "prompter", OWN, "prompt"),
    "evaluate": (run_evaluate, EvalConfig, "prompter", OWN, "prompt"),
    "sft": (run_sft, SftConfig, "prompter", {}, "prompt"),
    "sft, instruction": (run_sft, SftConfig, "prompter", {}, "instruction"),
    "prefer": (run_prefer, PreferConfig, "prompter", {}, "prompt"),
    "prefer, answer": (run_prefer, PreferConfig, "prompter", {}, "chosen"),
    "prefer, target": (run_prefer, PreferConfig, "target", {"policy": "target"}, "prompt"),
    "reward fit": (lambda c: run_reward_fit(c, "o"), RewardFitConfig, "model", {}, "prompt"),
    "reward fit, answer": (
        lambda c: run_reward_fit(c, "o"),
        RewardFitConfig,
        "model",
        {},
        "chosen",
    ),
    "self-improve": (run_self_improve, SelfImproveConfig, "target", {"policy": "target"}, "prompt"),
    "extract": (run_extract, ExtractConfig, "target", RECORDS, "text"),
    # What only a reward reads.
    "train, source": (make_trainer, TrainConfig, "prompter", GROUNDING, "source"),
    "evaluate, source": (run_evaluate, EvalConfig, "prompter", GROUNDING, "source"),
    "safety, source": (run_evaluate, EvalConfig, "prompter", HARM, "source"),
    "headroom, source": (run_headroom, HeadroomConfig, "prompter", GROUNDING, "source"),
    "bound, source": (run_bound, BoundConfig, "prompter", GROUNDING, "source"),
    "self-improve, source": (
        *(run_self_improve, SelfImproveConfig, "target"),
        *({"policy": "target"}, "source"),
    ),
    "self-improve, measured": (
        *(run_self_improve, SelfImproveConfig, "prompter"),
        *({"policy": "prompter", "calibrator": "topic"}, "source"),
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_row_is_refused_by_its_beginning(kind, tiny_model_dir, tmp_path, monkeypatch):
    run, cls, role, given, huge = HUGE[kind]
    prompt = "text" if cls is ExtractConfig else "prompt"
    row = {prompt: "why?", "instruction": "Be brief.", "chosen": "a", "rejected": "b"}
    row["source"] = "a red roof"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text('{"fields": {"name": "text"}}')
    marked = row | {"harmful": True}
    rows = [row, row | {huge: "why " * 250_000}, marked, marked]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, encoded = {"model": str(tiny_model_dir("llama")), "context_length": 250}, []
    whole = tokenizer._encode

    def counting(backend, *rest):
        encoded.append(CountingBackend(backend))
        return whole(encoded[-1], *rest)

    monkeypatch.setattr(tokenizer, "_encode", counting)
    shared = {"data": {"path": "q.jsonl", "split": None}, role: model, "threads": 1, **given}
    with pytest.raises(ValueError, match=r"^q.jsonl, line 2: .*more than 500 tokens.*context of"):
        run(from_mapping(cls, shared))
    assert 0 < sum(one.characters for one in encoded) < 100_000


@pytest.mark.parametrize(("how", "said"), [("skip", "left out"), ("cut", "cut")])
def test_a_row_too_long_is_counted_in_the_run(stage, tmp_path, how, said):
    trainer = make_trainer(stage(TrainConfig, on_too_long=how))
    assert len(trainer.prompts) == (3 if how == "skip" else 4)
    trainer.train()
    (row,) = read_metrics(tmp_path / "alignpro-run" / "metrics.jsonl")
    note = f"1 of 4 rows were too long for a model, and {said}: q.csv, line 3"
    assert row["too_long"] == note and row["scored_responses"] == 8
    run_sft(stage(SftConfig, on_too_long=how))


def test_rows_without_a_score_are_left_out_of_the_run(stage, tmp_path):
    (tmp_path / "own_reward.py").write_text(
        "async def of_a(completions, task, completion_ids, **columns):\n"
        "    assert [len(ids) > 0 for ids in completion_ids]\n"
        "    return [None if t == 'b' else float(len(c)) for c, t in zip(completions, task)]\n"
    )
    settings = stage(TrainConfig, on_too_long="skip", reward="own_reward:of_a")
    make_trainer(settings).train()
    (row,) = read_metrics(tmp_path / "alignpro-run" / "metrics.jsonl")
    assert row["unscored_responses"] > 0
    assert row["scored_responses"] + row["unscored_responses"] == 8
    lines = (tmp_path / "alignpro-run" / "config.json").read_text()
    assert json.loads(lines)["data"]["prompt"] == "question"


def test_a_column_that_the_reward_needs_is_looked_for_first(stage, tmp_path, monkeypatch):
    (tmp_path / "needing_reward.py").write_text("def f(responses, gold): return []\n")
    monkeypatch.setattr("alignpro.train.run.load_models", None)
    with pytest.raises(ValueError, match=r"needs the data column 'gold'; columns here: .*task"):
        make_trainer(stage(TrainConfig, reward="needing_reward:f"))


@pytest.fixture
def anchored(stage, tmp_path):
    """Of five rows, the fourth has an anchor that is too long, and the fifth a long one."""
    rows = [
        {"question": "bees?"},
        {"question": "owls?", "safe": "birds?"},
        {"question": "moss?"},
        {"question": "ants?", "safe": LONG},
        {"question": "bats?", "safe": LONG[:120]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(anchor, **changes):
        data = {"path": "a.jsonl", "prompt": "question"}
        return stage(TrainConfig, **{"anchor": anchor, **changes, "data": data})

    return make


@pytest.mark.parametrize("policy", ["prompter", "target"])
def test_an_anchor_too_long_is_named_or_left_out(anchored, policy, tmp_path):
    given = {"policy": policy}
    if policy == "target":
        given |= {"prompter": {}, "target": to_mapping(anchored({}).prompter)}
    where = f"in the {policy}'s template: more than 400 tokens"
    with pytest.raises(ValueError, match=f"^a.jsonl, line 4: the anchor {where}.*context of"):
        make_trainer(anchored({"column": "safe"}, **given))
    with pytest.raises(ValueError, match=r"line 4: the anchor .* nothing of the prompt is left"):
        make_trainer(anchored({"column": "safe"}, **given, on_too_long="cut"))
    trainer = make_trainer(anchored({"column": "safe"}, **given, on_too_long="skip"))
    assert trainer.prompts == ["bees?", "owls?", "moss?", "bats?"]
    own = [trainer._read_by_policy(p, 0) for p in trainer.prompts]
    read = [trainer._read_by_policy(p, 0) for p in ("birds?", LONG[:120])]
    assert trainer._anchors == [None, read[0], None, read[1]] and own[1] != read[0]
    trainer.train()
    (row,) = read_metrics(tmp_path / "alignpro-run" / "metrics.jsonl")
    assert row["too_long"] == "1 of 5 rows were too long for a model, and left out: a.jsonl, line 4"


def test_a_prompt_behind_a_prefix_is_cut_until_both_fit(anchored, stage, tmp_path):
    rows = [{"question": "bees?"}, {"question": LONG[:100], "harmful": True}]
    given = anchored({"column": None, "prefix": LONG[:100], "where": "harmful"}, on_too_long="cut")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer(given)
    assert " [...] " in trainer.prompts[1] and trainer.notes["too_long"].endswith("line 2")
    most = given.prompter.context_length - given.rewrite.max_new_tokens
    assert most - 4 < len(trainer._anchors[1]) <= most


def test_no_target_reads_an_anchor(anchored, tmp_path):
    """It has no room for the long one."""
    given = anchored({"column": "safe"}, on_too_long="skip")
    short = replace(given.prompter, context_length=90)
    assert len(make_trainer(replace(given, target=short)).prompts) == 4


def test_anchors_are_looked_for_before_a_model_is_loaded(anchored, monkeypatch):
    monkeypatch.setattr("alignpro.train.run.load_models", None)
    with pytest.raises(ValueError, match="anchor: no row is marked by column 'harmful'"):
        make_trainer(anchored({"column": "safe", "where": "harmful"}))
