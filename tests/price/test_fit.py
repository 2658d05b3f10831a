"""The memory that is said of a fit to pairs, beside what its own steps ask for."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import PreferConfig, SftConfig, TrainConfig, from_mapping
from alignpro.models.native_model import load_model
from alignpro.native import core
from alignpro.price.fit import price_fit
from alignpro.train.policy import LoraPolicy
from alignpro.train.run import run_prefer, run_sft

RUNS = {"sft": (SftConfig, run_sft), "prefer": (PreferConfig, run_prefer)}
SCORING = "scoring (memory_limit bounds it)"


@pytest.fixture
def settings(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["why?", "how is it done?", "who was it that said so, and when?", "tell me more"]
    rows = [
        {"prompt": w, "instruction": w[:5], "chosen": w[1:], "rejected": w[:3]} for w in words * 2
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data": "q.jsonl", "threads": 1, "run_dir": "run", "lora": {"rank": 3}, "steps": 8}
    shared |= {"prompter": {"model": str(tiny_model_dir("llama"))}, "batch_size": 3}
    return lambda command, **changes: from_mapping(RUNS[command][0], {**shared, **changes})


@pytest.mark.parametrize("command", RUNS)
def test_no_step_holds_more_than_is_said(command, settings, monkeypatch):
    held, score = [], LoraPolicy.score

    def scored(policy, sequences, starts, *, activations="keep", **options):
        held.append(policy.score_bytes(sequences, starts, activations, with_reference=False))
        return score(policy, sequences, starts, activations=activations, **options)

    monkeypatch.setattr(LoraPolicy, "score", scored)
    config = settings(command)
    said = price_fit(config)
    RUNS[command][1](config)
    assert max(held) == said["memory"][SCORING]
    assert min(held) < max(held) and said["micro_batches"] == 1
    model = load_model(config.prompter, 1)
    assert said["memory"]["weights"] == model.core_model.config["weight_bytes"]
    trained = sum(p.numel() for p in LoraPolicy.fresh(model, config.lora, seed=0).parameters())
    assert said["lora_parameters"] == trained and said["memory"]["LoRA AdamW"] == 8 * trained
    assert said["memory_bytes"] == sum(said["memory"].values())


@pytest.mark.parametrize("command", RUNS)
def test_a_limit_cuts_the_steps_that_are_above_it(command, settings):
    whole = price_fit(settings(command))["memory"][SCORING]
    cut = price_fit(settings(command, memory_limit=whole - 1, activations="keep"))
    assert cut["micro_batches"] == 2 and cut["memory"][SCORING] < whole
    with pytest.raises(ValueError, match=r"memory_limit is 99"):
        price_fit(settings(command, memory_limit=99))


@pytest.mark.parametrize("command", RUNS)
def test_the_command_loads_no_weights_and_writes_nothing(command, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(core.Model, "load", None)
    model = settings(command).prompter.model
    given = [f"prompter.model={model}", "data=q.jsonl", "threads=1", "batch_size=3"]
    done = CliRunner().invoke(app, [command, "--dry-run", *given])
    assert done.exit_code == 0, done.output
    for said in ("weights", "LoRA AdamW", SCORING, "in all", "8 pairs, of"):
        assert said in done.output
    assert ("under the reference" in done.output) == (command == "prefer")
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


FIT = {"algorithm": "closed_form", "prompts_per_step": 4, "num_rewrites": 3, "num_responses": 2}
TARGET_KV, KV = "keys and values of the target", "keys and values"


@pytest.fixture
def drawn(settings, tiny_model_dir):
    """Training by a fit to what the run draws for itself."""
    mine = settings("sft").prompter
    shared = {"data": "q.jsonl", "threads": 1, "prompter": {"model": mine.model}}
    shared |= {"rewrite": {"max_new_tokens": 3}, "response": {"max_new_tokens": 5}}
    return lambda **changes: from_mapping(TrainConfig, {**shared, **FIT, **changes})


def test_a_closed_form_holds_a_batch_of_its_fit_and_all_that_is_drawn(drawn, tiny_model_dir):
    pooled = price_fit(drawn(closed_form={"loss": "pooled", "batch_size": 2}))["memory"]
    whole = price_fit(drawn())["memory"]
    assert "scoring under the reference" in whole and "scoring under the reference" not in pooled
    assert pooled[SCORING] < whole[SCORING]
    assert pooled[KV] == whole[KV] > 0 and TARGET_KV not in whole  # one engine

    other = {"target": {"model": str(tiny_model_dir("qwen2"))}}
    three, one = (
        price_fit(drawn(**other, closed_form={"loss": "pooled", "answers": answers}))["memory"]
        for answers in (3, 1)
    )
    assert three["target weights"] > 0 and three[KV] == one[KV] < whole[KV]
    assert 3 * one[TARGET_KV] > three[TARGET_KV] > 1.3 * one[TARGET_KV] > 0
    bounded = {**other["target"], "kv_cache_bytes": 4096}
    assert price_fit(drawn(target=bounded))["memory"][TARGET_KV] == 4096


def test_more_prompts_than_there_are_are_refused_as_by_the_run(drawn):
    with pytest.raises(ValueError, match=r"num_prompts: expected at most the 8 prompts there are"):
        price_fit(drawn(closed_form={"num_prompts": 9}))


def test_of_an_endpoint_a_closed_form_asks_once(drawn):
    there = {"model": "big", "endpoint": "http://127.0.0.1:9/v1"}
    every = price_fit(drawn(target=there))
    assert every["endpoint"]["calls"] == 8 * 3 * 2 and TARGET_KV not in every["memory"]
    assert every["endpoint"]["output_tokens"] == 8 * 3 * 2 * 5
    some = {"loss": "pooled", "answers": 2}
    assert price_fit(drawn(target=there, closed_form=some))["endpoint"]["calls"] == 8 * 2 * 2


def test_train_says_the_memory_of_a_closed_form(drawn, monkeypatch):
    monkeypatch.setattr(core.Model, "load", None)
    config = drawn()
    given = ["algorithm=closed_form", f"prompter.model={config.prompter.model}", "data=q.jsonl"]
    done = CliRunner().invoke(app, ["train", "--dry-run", *given])
    assert done.exit_code == 0, done.output
    assert "8 prompts, of" in done.output and "Time is not priced" in done.output
    done = CliRunner().invoke(app, ["train", "--dry-run", "--gpu", "H100", *given])
    assert done.exit_code == 2 and "--gpu: goes with the price of an algorithm" in done.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "owner/pairs"}, "owner/pairs is not on this machine"),
        ({"prompter": {"model": "Qwen/Qwen2.5-1.5B-Instruct"}}, "1.5B-Instruct is not on this"),
        ({"tuner": "soft_prompt", "lora": {}}, "tuner lora, got cpu and soft_prompt"),
    ],
)
def test_what_cannot_be_said(changes, said, settings, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=said):
        price_fit(settings("sft", **changes))
