"""A command that is refused, however late, leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from native_runs import lora, save_run

SHORT = "response.max_new_tokens=8"
REWARD = "reward=letter_reward:count_e"
QUICKSTART = ["quickstart", REWARD, "evaluate.static=null", "evaluate.labelled=null"]
QUICKSTART += ["evaluate.policy_text=null", "--run", "a/run"]
COMMANDS = {
    "train": ["train", "data=q.jsonl", REWARD, "run_dir=a/run"],
    "sft": ["sft", "data=q.jsonl", "run_dir=a/run"],
    "prefer": ["prefer", "data=q.jsonl", "run_dir=a/run"],
    "self-improve": ["self-improve", "data=q.jsonl", "run_dir=a/run"],
    "evaluate": ["evaluate", "data=q.jsonl", "data.split=train", REWARD, "--output", "o.json"],
    "safety": ["safety", "data=q.jsonl", "data.split=train", REWARD, "--output", "o.json"],
    "headroom": ["headroom", "data=q.jsonl", REWARD, "--output", "o.json", "--samples", "s.jsonl"],
    "bound": ["bound", "data=q.jsonl", "data.split=train", REWARD, "--output", "o.json"],
    "extract": ["extract", "q.jsonl", "--schema", "s.json", "--output", "o.jsonl", SHORT],
    "mix": ["mix", "runs=[kind,brief]", "data=q.jsonl", "--output", "a/mixed"],
    "mix, distilled": ["mix", "runs=[kind,brief]", "data=q.jsonl", "--distill", "--output", "a"],
    "reward fit": ["reward", "fit", "q.jsonl", "--output", "a/reward"],
    "quickstart": [*QUICKSTART, "train.data=q.jsonl"],
    "quickstart, warm start": [*QUICKSTART, "sft.data=q.jsonl"],
    "quickstart, evaluation": [*QUICKSTART, "evaluate.data=q.jsonl", "evaluate.data.split=train"],
}


@pytest.fixture
def place(tiny_model_dir, tmp_path, monkeypatch):
    """Rows of which the second is too long for the model, which is found with the model loaded."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model_dir("llama")
    row = {"prompt": "why?", "instruction": "Be brief.", "chosen": "a", "rejected": "b"}
    rows = [{**row, "text": "a", "record": {"name": "a"}, "harmful": i > 1} for i in range(4)]
    rows[1] |= {"prompt": "why " * 300, "text": "why " * 300}
    lines = [json.dumps({**row, "forbidden": "e", "split": "train"}) for row in rows]
    Path("q.jsonl").write_text("\n".join(lines))
    Path("s.json").write_text('{"fields": {"name": "text"}}')
    for seed, name in enumerate(("kind", "brief"), start=1):
        save_run(tmp_path / name, model, new_tokens=3)
        save_peft(tmp_path / name / "adapter", lora(load_model(model, threads=1), seed=seed))
    return model


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_left(name, place, tmp_path):
    words = list(COMMANDS[name])
    role = {"mix": None, "reward": "model", "extract": "target.model"}.get(words[0], "prompter")
    words += [] if role is None else [f"{role}={place}"]
    words += [f"target={place}"] if words[0] == "quickstart" else []
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "q.jsonl, line 2: " in done.stderr, done.output
    assert "exceed the context" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["train", "mix", "reward fit"])
def test_a_folder_that_cannot_be_made_is_refused_first(name, place, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a file")
    for module in ("train.run", "evaluate.mix", "train.reward_fit"):
        monkeypatch.setattr(f"alignpro.{module}.load_model", None)
    monkeypatch.setattr("alignpro.train.run.load_models", None)
    done = CliRunner().invoke(app, COMMANDS[name])
    assert done.exit_code == 2, done.output
    assert f"expected a folder, and {tmp_path / 'a'} is a file" in done.stderr
