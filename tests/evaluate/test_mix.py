"""Prompters of several goals as one: the stacked adapter, the weights, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import MixConfig
from alignpro.evaluate.mix import run_mix, soup_of
from alignpro.models.adapter import LoraWeights, save_peft
from alignpro.models.native_model import load_model
from native_runs import lora, save_run


@pytest.fixture
def runs(tiny_model_dir, tmp_path):
    """Two runs of a tiny model, which began with its base weights."""
    base, model = tiny_model_dir("llama"), load_model(tiny_model_dir("llama"), threads=1)
    for seed, name in enumerate(("kind", "brief"), start=1):
        save_run(tmp_path / name, base, new_tokens=3)
        weights = lora(model, seed=seed)
        small = {n: (a, b * np.float32(0.3)) for n, (a, b) in weights.matrices.items()}
        save_peft(tmp_path / name / "adapter", replace(weights, matrices=small))
    return tmp_path


def config(runs, **changes):
    options = {"num_prompts": 6, "num_rewrites": 24, "threads": 2, "kl_coef": None, **changes}
    return MixConfig(runs=(str(runs / "kind"), str(runs / "brief")), **options)


def update(weights: LoraWeights, name: str) -> np.ndarray:
    a, b = weights.matrices[name]
    return weights.scale * (b.astype(np.float64) @ a)


def test_a_stacked_adapter_has_the_weighted_sum_of_the_updates(tiny_model_dir):
    model = load_model(tiny_model_dir("llama"), threads=1)
    first, second = lora(model, seed=1), lora(model, seed=2, modules=3)
    rest = replace(lora(model, seed=3), alpha=1.0)
    whole = soup_of([first, second], [0.3, 0.9], rest)
    for name in first.matrices:
        expected = 0.3 * update(first, name) - 0.2 * update(rest, name)
        if name in second.matrices:
            expected = expected + 0.9 * update(second, name)
        np.testing.assert_allclose(update(whole, name), expected, atol=2e-6)
    assert whole.rank == 6 and whole.scale == 1.0
    alone = soup_of([first, second], [1.0, 0.0], rest)
    assert alone.rank == 2
    tokens = [1, 20, 30, 40, 50]
    scores = [
        model.core_model.score([tokens], [1], adapter=model.make_adapter(w)).logprob
        for w in (first, alone)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-5)


def test_the_worst_off_goal_is_served_best(runs):
    report = run_mix(config(runs))
    kind, brief = report.goals.values()
    assert kind.weight + brief.weight == pytest.approx(1.0) and min(kind.weight, brief.weight) > 0
    assert report.kkt_gap < 1e-7
    assert kind.of_mixture == pytest.approx(brief.of_mixture, abs=1e-7)  # both are active
    worst = min(kind.of_mixture, brief.of_mixture)
    # Each prompter serves its own goal, at the other's cost; the mixture serves both.
    assert min(kind.of_expert, brief.of_expert) > worst
    assert report.value < 0 and report.kl == pytest.approx(
        worst / report.kl_coef - report.value, abs=1e-9
    )
    again = run_mix(config(runs))
    assert again == report


def test_the_command_writes_an_adapter_that_loads(runs, monkeypatch):
    monkeypatch.chdir(runs)
    arguments = ["mix", "runs=[kind,brief]", "num_prompts=4", "num_rewrites=8", "--output", "mixed"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "KKT gap" in done.output and "kind" in done.output
    written = json.loads((runs / "mixed" / "mixture.json").read_text())
    base = json.loads((runs / "kind" / "config.json").read_text())["prompter"]["model"]
    weights = load_model(base, threads=1).load_adapter(runs / "mixed" / "adapter")
    assert weights.rank == 4
    name = next(iter(weights.matrices))
    expected = sum(
        goal["exponent"]
        * update(load_model(base, threads=1).load_adapter(runs / run / "adapter"), name)
        for run, goal in written["goals"].items()
    )
    np.testing.assert_allclose(update(weights, name), expected, atol=1e-5)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "is there already" in again.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_advantage": True}, "trained with normalize_advantage"),
        ({"kl_coef": 0.0}, "expected a kl_coef above 0, got 0"),
        ({"prompting": {"template": "other {prompt}"}}, "kind and .*brief differ in prompting"),
        ({"policy": "target", "prompting": None}, "expected the training of a prompter"),
    ],
)
def test_runs_that_do_not_mix(runs, change, message):
    path = runs / "brief" / "config.json"
    record = json.loads(path.read_text())
    record |= {key: value for key, value in change.items() if value is not None}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        run_mix(config(runs))


def test_runs_of_another_reference_or_none(runs, tiny_model_dir):
    model = load_model(tiny_model_dir("llama"), threads=1)
    save_peft(runs / "brief" / "reference", lora(model, seed=9))
    with pytest.raises(ValueError, match="expected trainings of one untuned prompter"):
        run_mix(config(runs))
    with pytest.raises(FileNotFoundError, match="nowhere: expected the directory of a run"):
        run_mix(replace(config(runs), runs=(str(runs / "kind"), "nowhere")))
    with pytest.raises(ValueError, match="runs: expected two or more, each once"):
        MixConfig(runs=("a", "a"))
