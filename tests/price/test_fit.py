"""The memory that is said of a fit to pairs, beside what its own steps ask for."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import PreferConfig, SftConfig, from_mapping
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
