"""TRL's trainer beside a quickstart's run, at toy size: what is measured, from where, and when."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignpro.config import QUICKSTART, QuickstartConfig, load_yaml
from alignpro.quickstart import run_quickstart

for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from bench import trl_reward  # noqa: E402

SMALL = [
    "threads=1",
    "reward=letter_reward:count_e",
    "target=null",
    "lora.rank=2",
    "sft.steps=2",
    "sft.batch_size=4",
    "train.steps=2",
    "train.prompts_per_step=2",
    "train.num_rewrites=2",
    "evaluate.num_prompts=4",
    "evaluate.num_rewrites=2",
    *(f"evaluate.{arm}=null" for arm in ("static", "policy_text", "labelled")),
    *(f"{s}.{w}.max_new_tokens=4" for s in ("train", "evaluate") for w in ("rewrite", "response")),
]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    given = [f"prompter.model={tiny_model_dir('llama')}", f"run_dir={folder}"]
    return run_quickstart(load_yaml(QuickstartConfig, QUICKSTART, [*SMALL, *given])).run_dir


@pytest.mark.parametrize("rate", ["0", "0.5"])
def test_trl_starts_at_the_warm_start_and_is_measured_as_the_run_was(run, tmp_path, capsys, rate):
    file = tmp_path / "trl.json"
    work = ["--every", "2", "--times", "0", "--prompts", "2", "--rewrites", "2", "--threads", "1"]
    trl_reward.main(["--run", str(run), "--json", str(file), *work, "--learning-rate", rate])
    report, arms = (
        json.loads(file.read_text()),
        json.loads((run / "report.json").read_text())["arms"],
    )
    ours = report["ours"]
    assert ours["reward"] == arms["trained"]["mean_reward"] == pytest.approx(ours["measured_here"])
    assert report["untuned"] == pytest.approx(arms["untuned"]["mean_reward"])
    (row,) = report["measured"]  # --times is over with the first
    assert row["step"] == 2 and row["seconds"] > 0
    if rate == "0":  # what was loaded is the warm start
        assert row["reward"] == report["untuned"]
    else:
        assert row["reward"] != report["untuned"]
    assert report["reached"] == (row if row["reward"] >= ours["reward"] else None)
    assert {"trl", "peft", "transformers", "torch", "alignpro"} <= set(report["versions"])
    said = [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [word for word in said if word in ("ours:", "step", "best")] == ["ours:", "step", "best"]


def test_the_clock_stands_still_while_it_is_measured(tmp_path, monkeypatch):
    now, saved = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds, value=None):
        now[0] += seconds
        return value

    model = SimpleNamespace(save_pretrained=lambda folder: passes(50, saved.append(folder)))
    held_out = SimpleNamespace(measure=lambda folder: passes(1000, 0.25))
    report = {"ours": {"seconds": 10.0}, "measured": []}
    options = Namespace(every=2, times=1.5, json=tmp_path / "r.json")
    watch = trl_reward.Watch(held_out, tmp_path / "adapter", report, options)
    control = SimpleNamespace(should_training_stop=False)
    watch.on_train_begin(None, None, control)
    for step in range(1, 7):
        passes(3)
        watch.on_step_end(None, SimpleNamespace(global_step=step), control, model=model)
        assert control.should_training_stop == (step == 6)  # 18 s are more than 1.5 times 10
    assert [(row["step"], row["seconds"]) for row in report["measured"]] == [
        (2, 6),
        (4, 12),
        (6, 18),
    ]
    assert saved == [tmp_path / "adapter"] * 3
    assert json.loads(options.json.read_text()) == report
