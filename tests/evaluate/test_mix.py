"""Prompters of several goals as one: the stacked adapter, the weights, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import (
    AnchorConfig,
    BoundConfig,
    DataConfig,
    EvalConfig,
    MixConfig,
    PreferConfig,
    PreferencesConfig,
    to_mapping,
)
from alignpro.evaluate.bound import run_bound
from alignpro.evaluate.mix import run_mix, soup_of
from alignpro.evaluate.run import run_evaluate
from alignpro.models.adapter import LoraWeights, save_peft
from alignpro.models.mixture import Mixture, read_mixture
from alignpro.models.native_model import load_model
from alignpro.run_directory import config_of_run, read_record
from alignpro.types import SamplingParams
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
    report = run_mix(config(runs, weights="whole"))
    kind, brief = report.goals.values()
    assert kind.whole_weight is None
    assert kind.weight + brief.weight == pytest.approx(1.0) and min(kind.weight, brief.weight) > 0
    assert report.kkt_gap < 1e-7
    assert kind.of_mixture == pytest.approx(brief.of_mixture, abs=1e-7)  # both are active
    worst = min(kind.of_mixture, brief.of_mixture)
    # Each prompter serves its own goal, at the other's cost; the mixture serves both.
    assert min(kind.of_expert, brief.of_expert) > worst
    assert report.value < 0 and report.kl == pytest.approx(
        worst / report.kl_coef - report.value, abs=1e-9
    )
    for goal in (kind, brief):  # token by token is near it
        assert goal.of_drawn == pytest.approx(goal.of_mixture, abs=0.5 * abs(goal.of_expert))
    assert report.acceptance is not None
    error = (report.acceptance.high - report.acceptance.low) / 3.92
    assert report.expected_acceptance == pytest.approx(report.acceptance.mean, abs=3 * error)
    again = run_mix(config(runs, weights="whole"))
    assert again == report


def test_what_is_drawn_token_by_token_has_weights_of_its_own(runs):
    whole, drawn = run_mix(config(runs, weights="whole")), run_mix(config(runs))
    assert [goal.whole_weight for goal in drawn.goals.values()] == [
        goal.weight for goal in whole.goals.values()
    ]
    lesser, apart = [], []
    for report in (whole, drawn):
        kind, brief = (goal.of_drawn for goal in report.goals.values())
        lesser.append(min(kind, brief))
        apart.append(abs(kind - brief))
    assert lesser[1] > lesser[0] and apart[1] < apart[0] / 2
    with pytest.raises(ValueError, match="weights: drawn is for sampling token"):
        config(runs, weights="drawn", sampling="sequence")


def test_progress_names_the_scoring_as_well_as_the_writing(runs):
    shown = {}
    config = MixConfig(
        (str(runs / "kind"), str(runs / "brief")), num_prompts=2, num_rewrites=2, weights="whole"
    )
    run_mix(config, on_progress=lambda name, done, total: shown.update({name: (done, total)}))
    scored = ("all prompters, scored", "the mixture, scored", "the mixed adapter, scored")
    assert {name: shown[name] for name in scored} == dict.fromkeys(scored, (3, 3))


def test_whole_rewrites_are_drawn_by_rejection(runs):
    report = run_mix(config(runs, sampling="sequence", tries=60), runs / "whole")
    assert read_mixture(runs / "whole").sampling == "sequence"
    once = run_mix(config(runs, sampling="sequence", tries=1))
    assert once.given_up == pytest.approx(1 - once.acceptance.mean, abs=0.05)
    assert 0 <= report.given_up < 0.5 * once.given_up
    assert report.acceptance == once.acceptance  # of token-wise draws, both


def test_one_prompter_serves_another_kl_coef(runs, monkeypatch):
    """Weights {adapter: s, untuned: 1 - s}; twice the KL penalty is half the adapter's weight."""
    monkeypatch.chdir(runs)
    trained = json.loads((runs / "kind" / "config.json").read_text())["kl_coef"]
    arguments = [
        "mix",
        "runs=[kind]",
        f"kl_coef={2 * trained}",
        "num_prompts=4",
        "--output",
        "half",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads((runs / "half" / "mixture.json").read_text())
    assert written["members"] == {"members/1-kind": pytest.approx(0.5), "base": pytest.approx(0.5)}
    base = json.loads((runs / "kind" / "config.json").read_text())["prompter"]["model"]
    model = load_model(base, threads=1)
    adapter = model.load_adapter(runs / "kind" / "adapter")
    params = SamplingParams(max_new_tokens=5, seed=1)
    expected = model.generate([[1, 2]], params, adapter=Mixture(((adapter, 0.5), ("base", 0.5))))
    assert model.generate([[1, 2]], params, adapter=runs / "half") == expected
    # Less of a penalty than it was trained with: a negative weight, and no exact sampler.
    bold = config(runs, kl_coef=trained / 2)
    bold = replace(bold, runs=(str(runs / "kind"),))
    report = run_mix(bold, runs / "bold")
    assert report.goals[str(runs / "kind")].exponent == pytest.approx(2.0)
    assert report.acceptance is None
    with pytest.raises(ValueError, match=r"exponents that sum to 1 or less, got 2 .*kl_coef=0\.05"):
        run_mix(replace(bold, sampling="sequence"))
    with pytest.raises(ValueError, match="two or more, each once, or one and a kl_coef"):
        MixConfig(runs=("a",))


def test_a_mixture_is_evaluated_as_an_adapter(runs, tmp_path):
    run_mix(config(runs), runs / "mixed")
    base = json.loads((runs / "kind" / "config.json").read_text())["prompter"]["model"]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("he", "in", "on")), "utf-8")
    options = EvalConfig(
        prompter={"model": base},
        trained=str(runs / "mixed"),
        data={"path": str(data), "split": None},
        reward="letter_reward:count_e",
        num_rewrites=2,
        rewrite=SamplingParams(max_new_tokens=3),
        response=SamplingParams(max_new_tokens=2),
        threads=1,
    )
    output = tmp_path / "evaluation.json"
    report = run_evaluate(options, output=output)
    assert report.kl_per_rewrite is not None and report.kl_per_rewrite > 0
    again = run_evaluate(options, output=output)  # every arm is known again
    assert again.arms == report.arms
    path = runs / "mixed" / "mixture.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "sampling": "sequence"}))
    whole = run_evaluate(options, output=output)
    assert whole.kl_per_rewrite is None  # of whole rewrites there is none by token
    assert whole.arms["untuned"] == report.arms["untuned"]
    path.write_text('{"members": {"gone": 1}}')
    with pytest.raises(ValueError, match=r"trained: .*mixture.json: .*gone: no adapter_config"):
        run_evaluate(options)


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
    model = load_model(base, threads=1)
    parts = [model.load_adapter(runs / run / "adapter") for run in ("kind", "brief")]
    weights = [goal["exponent"] for goal in written["goals"].values()]
    params = SamplingParams(max_new_tokens=5, seed=1)
    mixture = Mixture(tuple(zip(parts, weights, strict=True)))
    drawn = model.generate([[1, 2]], params, adapter=runs / "mixed")
    assert drawn == model.generate([[1, 2]], params, adapter=mixture)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "mixed: is not empty; name another folder" in again.output


@pytest.mark.parametrize("written", ["alignpro.evaluate.mix.save_mixture", "os.replace"])
def test_a_mixture_is_written_whole_or_not_at_all(runs, monkeypatch, written):
    """Killed at any of its files, the same command does it in the same folder."""

    def killed(*given, **named):
        raise KeyboardInterrupt

    small = config(runs, num_rewrites=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(written, killed)
        run_mix(small, runs / "mixed")
    assert not (runs / "mixed").exists()
    (runs / "mixed").mkdir()
    run_mix(small, runs / "mixed")
    assert {entry.name for entry in (runs / "mixed").iterdir()} == {
        *("adapter", "members", "mixture.json"),
    }
    assert not (runs / "mixed.partial").exists()
    with pytest.raises(FileExistsError, match="kind: is not empty; name another folder"):
        run_mix(small, runs / "kind")
    monkeypatch.setattr("os.path.ismount", lambda path: path == runs / "volume")
    with pytest.raises(FileExistsError, match="volume: is a mount; name a folder in it"):
        run_mix(small, runs / "volume")


def test_each_run_is_read_once(runs, monkeypatch):
    monkeypatch.chdir(runs)
    read = []
    monkeypatch.setattr(
        "alignpro.run_directory.read_record", lambda path: read.append(path) or read_record(path)
    )
    arguments = ["mix", "runs=[kind,brief]", "num_prompts=2", "num_rewrites=2", "--output", "mixed"]
    for more in (["--distill", "--dry-run"], []):
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 0, done.output
        assert read == [Path("kind/config.json"), Path("brief/config.json")]
        read.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_advantage": True}, "trained with normalize_advantage"),
        ({"anchor": {}}, "trained with anchor, so that its reference read other prompts"),
        ({"kl_coef": 0.0}, "expected a kl_coef above 0, got 0"),
        (
            {"prompting": {"template": "other {prompt}"}},
            r"kind and .*brief differ in .*prompting\.template: '.*', 'other {prompt}'$",
        ),
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


def test_trainings_on_preferences_mix_as_those_by_rewards(runs):
    prompts = ["he", "on", "so"]
    by_reward = config(runs, num_rewrites=6, data=DataConfig(str(runs / "p.jsonl")))
    (runs / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    expected = run_mix(by_reward)
    pairs = [{"prompt": p, "chosen": c, "rejected": "no"} for p in prompts for c in ("a", "b")]
    (runs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    trained = config_of_run(runs / "kind")
    preferring = PreferConfig(
        prompter=trained.prompter,
        prompting=trained.prompting,
        data=PreferencesConfig(str(runs / "pairs.jsonl")),
        beta=trained.kl_coef,
    )

    def on_preferences(name, **changes):
        record = to_mapping(replace(preferring, **changes))
        (runs / name / "config.json").write_text(json.dumps(record))

    on_preferences("brief")
    mixed = run_mix(by_reward)
    names = [str(runs / name) for name in ("kind", "brief")]
    assert mixed.goals[names[1]].reward == f"preferences {runs / 'pairs.jsonl'}"
    for name in names:
        assert replace(mixed.goals[name], reward="") == replace(expected.goals[name], reward="")
    on_preferences("kind")
    alone = run_mix(config(runs, num_rewrites=6))  # with the prompts of the pairs, each once
    assert alone.num_prompts == 3 and alone.kl_coef == expected.kl_coef
    for goal in alone.goals.values():
        assert goal.of_expert > 0 and goal.exponent > 0
    on_preferences("kind", anchor=AnchorConfig())
    with pytest.raises(ValueError, match="trained with anchor"):
        run_mix(config(runs))


def test_rows_that_training_left_out_are_left_out(runs, caplog):
    rows = [{"prompt": p} for p in ("he", "x " * 200, "on")]
    (runs / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = runs / "kind" / "config.json"
    trained = json.loads(path.read_text()) | {"data": {"path": str(runs / "p.jsonl")}}
    for how, count in (("skip", 2), ("cut", 3)):
        path.write_text(json.dumps(trained | {"on_too_long": how}))
        assert run_mix(config(runs, num_rewrites=2)).num_prompts == count
    assert "1 of 3 rows were too long for a model, and cut" in caplog.text
    path.write_text(json.dumps(trained))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: in the prompter's template: 404 tok"):
        run_mix(config(runs))


def test_runs_of_another_reference_or_none(runs, tiny_model_dir):
    model = load_model(tiny_model_dir("llama"), threads=1)
    save_peft(runs / "brief" / "reference", lora(model, seed=9))
    with pytest.raises(ValueError, match="expected trainings of one untuned prompter"):
        run_mix(config(runs))
    with pytest.raises(FileNotFoundError, match="nowhere: expected the directory of a run"):
        run_mix(replace(config(runs), runs=(str(runs / "kind"), "nowhere")))
    with pytest.raises(ValueError, match="runs: expected two or more, each once"):
        MixConfig(runs=("a", "./a"))


def test_a_bound_takes_no_whole_sequences(tmp_path):
    (tmp_path / "mixture.json").write_text('{"members": {"base": 1}, "sampling": "sequence"}')
    with pytest.raises(ValueError, match="tuned: expected a mixture with sampling token"):
        run_bound(BoundConfig(tuned=str(tmp_path)))
