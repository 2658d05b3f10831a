"""A quickstart that was interrupted, and what is still to be had of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import alignpro.quickstart
from alignpro.config import QuickstartConfig, TrainConfig, load_yaml
from alignpro.quickstart import run_quickstart
from alignpro.report.progress import TrainBar
from alignpro.run_directory import is_free
from alignpro.train.run import run_train
from test_cli import SENTIMENT, SMALL, run


def interrupted(monkeypatch, config, before):
    """before: the step that is not taken any more."""

    class Interrupts(TrainBar):
        def on_step(self, row):
            super().on_step(row)
            if row["step"] + 1 == before:
                raise KeyboardInterrupt

        def on_start(self, run_dir, config, step):
            super().on_start(run_dir, config, step)
            if before == 0:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(alignpro.quickstart, "TrainBar", Interrupts)
        run_quickstart(config)


def test_what_was_interrupted_in_training_is_resumed_and_compared(
    tiny_model_dir, tmp_path, monkeypatch
):
    def configured(name):
        given = [f"prompter.model={tiny_model_dir('llama')}", f"run_dir={tmp_path / name}"]
        given += ["train.steps=2", "evaluate.num_prompts=3"]
        return load_yaml(QuickstartConfig, SENTIMENT, [*SMALL, *given])

    whole = run_quickstart(configured("whole")).run_dir
    interrupted(monkeypatch, configured("torn"), before=1)
    torn = tmp_path / "torn"
    assert not (torn / "adapter").exists() and not (torn / "report.json").exists()
    run_train(load_yaml(TrainConfig, torn / "config.json"), resume=True)
    run("evaluate", "--run", torn, "--output", tmp_path / "late.json")
    late = json.loads(Path(tmp_path / "late.json").read_text())
    assert late["arms"] == json.loads((whole / "report.json").read_text())["arms"]

    interrupted(monkeypatch, configured("none"), before=0)
    assert is_free(tmp_path / "none")
