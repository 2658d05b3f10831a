"""Headroom runs: what is drawn, kept in a file and read again, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import DataConfig, HeadroomConfig, LoraConfig, ModelConfig, Prompting
from alignpro.data.load import load_prompts
from alignpro.evaluate import headroom as runs
from alignpro.evaluate.headroom import run_headroom
from alignpro.evaluate.inputs import load_rows
from alignpro.evaluate.results import HeadroomReport, from_json, to_json
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from alignpro.pipeline import Pipeline
from alignpro.theory.goals import forecast_goals
from alignpro.theory.headroom import headroom
from alignpro.train.policy import initial_weights
from alignpro.types import SamplingParams
from letter_reward import count_e

PROMPTING = Prompting(template="Advise: {prompt}", separator=" ")


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return HeadroomConfig(
        prompter=str(tiny_model_dir("llama")),
        reward="letter_reward:count_e",
        seed=3,
        num_prompts=4,
        num_rewrites=3,
        num_responses=2,
        rewrite=SamplingParams(max_new_tokens=5),
        response=SamplingParams(max_new_tokens=6, temperature=0.7),
        prompting=PROMPTING,
        kl_coefs=(0.2, 1.0),
        threads=2,
    )


@pytest.fixture(scope="module")
def drawn(config, tmp_path_factory):
    """One run, its samples and what it said of its progress."""
    samples = tmp_path_factory.mktemp("headroom") / "samples.jsonl"
    seen = []
    report = to_json(
        run_headroom(config, samples=samples, on_progress=lambda *row: seen.append(row))
    )
    return report, samples, seen


def rollout(config, adapter=None):
    model = load_model(config.prompter, threads=2)
    pipeline = Pipeline.configured(config, model, model, count_e).with_adapter(adapter)
    prompts = [row.prompt for row in load_prompts("everyday", split="train")[:4]]
    return pipeline.rollout(prompts, num_rewrites=3, num_responses=2, seed=3)


def test_it_is_the_theory_of_an_untuned_rollout(config, drawn):
    report, _, seen = drawn
    rewards = runs.rewards_of(rollout(config))
    assert rewards.shape == (4, 3, 2) and rewards.std() > 0
    expected = to_json(headroom(rewards, config.kl_coefs, seed=3))
    assert "goals" not in report  # of one part
    assert {key: report[key] for key in expected} == expected
    assert report["untuned_reward"] == pytest.approx(rewards.mean())
    assert [point["kl_coef"] for point in report["frontier"]] == [0.2, 1.0]
    assert set(report["frontier"][0]) >= {
        "kl_coef", "objective", "objective_ci95", "reward", "kl", "effective_samples",
        "crossfit_objective", "crossfit_reward", "crossfit_ci95",
    }  # fmt: skip
    assert set(report["best_of_n"][0]) >= {"n", "reward", "kl"}
    assert set(report["variance"]) == {"between_rewrites", "within_rewrite"}
    assert json.loads(json.dumps(report)) == report  # plain data
    assert seen[-1] == ("untuned prompter", 4 * 3 * 3, 4 * 3 * 3)


def test_samples_hold_every_rewrite(config, drawn):
    lines = [json.loads(line) for line in drawn[1].read_text().splitlines()]
    assert "kl_coefs" not in lines[0]["config"] and lines[0]["config"]["seed"] == 3
    flat = [w for group in rollout(config).rewrites for w in group]
    assert len(lines) == 1 + len(flat)
    for line, rewrite in zip(lines[1:], flat, strict=True):
        assert line["tokens"] == rewrite.tokens and line["logprobs"] == rewrite.logprobs
        assert line["prompter_tokens"] == rewrite.prompter_tokens
        assert line["responses"] == [r.text for r in rewrite.responses]
        assert line["rewards"] == [r.reward for r in rewrite.responses]


def test_samples_are_read_again_without_a_model(config, drawn, monkeypatch):
    report, samples, _ = drawn
    monkeypatch.setattr(runs, "load_models", lambda *_: pytest.fail("a model was loaded"))
    assert to_json(run_headroom(config, samples=samples)) == report
    changed = dataclasses.replace(config, kl_coefs=(3.0,), threads=1)
    other = to_json(run_headroom(changed, samples=samples))
    assert [point["kl_coef"] for point in other["frontier"]] == [3.0]
    assert other["untuned_reward"] == report["untuned_reward"]


def test_a_reward_of_two_parts_says_who_will_be_worst_off(config, tmp_path):
    two = "letter_reward:count_e+0.5*letter_reward:short"
    given = replace(config, reward=two, num_prompts=6)
    samples = tmp_path / "samples.jsonl"
    report = run_headroom(given, samples=samples)
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    names = ("letter_reward:count_e", "letter_reward:short")
    assert lines[0]["weights"] == dict(zip(names, (1.0, 0.5), strict=True))
    parts = {
        name: np.array([line["parts"][name] for line in lines[1:]], float).reshape(-1, 3, 2)
        for name in names
    }
    rewards = np.array([line["rewards"] for line in lines[1:]]).reshape(-1, 3, 2)
    whole = np.isfinite(parts[names[1]]).all(axis=(1, 2))  # a part that gave none adds nothing
    np.testing.assert_allclose(
        rewards, parts[names[0]] + 0.5 * np.nan_to_num(parts[names[1]]), atol=1e-12
    )
    kl_coef = report.headroom.recommended_kl_coef or 1.0
    expected = forecast_goals(
        {name: part[whole] for name, part in parts.items()}, lines[0]["weights"], kl_coef
    )
    assert report.goals == expected and expected.worst in names
    assert run_headroom(given, samples=samples).goals == expected
    plain = to_json(report)
    assert from_json(HeadroomReport, plain, "headroom") == report
    del lines[0]["weights"]  # as files were before
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_headroom(given, samples=samples).goals is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 4}, "drawn with seed = 3, this run asks for 4"),
        ({"reward": "vader"}, 'drawn with reward = "letter_reward:count_e"'),
        ({"num_rewrites": 2}, "drawn with num_rewrites = 3"),
        (
            {"response": SamplingParams(max_new_tokens=7)},
            r"drawn with response\.max_new_tokens = 6",
        ),
    ],
)
def test_samples_of_something_else_are_refused(config, drawn, changes, line):
    with pytest.raises(ValueError, match=line):
        run_headroom(dataclasses.replace(config, **changes), samples=drawn[1])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: "not JSON\n", "expected the samples of a headroom run"),
        (lambda text: "", "expected the samples of a headroom run"),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "expected 3 rewrites a prompt"),
        (lambda text: text.replace('"prompt_index": 0', '"prompt_index": 1', 1), "in order"),
        (lambda text: text.splitlines()[0] + "\n", "expected 3 rewrites a prompt"),
    ],
)
def test_damaged_samples_are_refused(config, drawn, tmp_path, damage, line):
    damaged = tmp_path / "samples.jsonl"
    damaged.write_text(damage(drawn[1].read_text()))
    with pytest.raises(ValueError, match=line):
        run_headroom(config, samples=damaged)


def test_samples_of_files_that_lie_elsewhere(config, drawn, tmp_path, monkeypatch):
    report, samples, _ = drawn
    there = shutil.copytree(config.prompter.name, tmp_path / "elsewhere")
    monkeypatch.setattr(runs, "load_models", None)
    again = run_headroom(replace(config, prompter=ModelConfig(str(there))), samples=samples)
    assert to_json(again)["frontier"] == report["frontier"]


def test_what_was_stopped_goes_on_with_its_samples(config, drawn, tmp_path, monkeypatch):
    report, _, _ = drawn
    output = tmp_path / "headroom.json"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "headroom", killed)
        with pytest.raises(KeyboardInterrupt):
            run_headroom(config, output=output)
    monkeypatch.setattr(Pipeline, "rollout", killed)
    assert to_json(run_headroom(config, output=output))["frontier"] == report["frontier"]
    with pytest.raises(ValueError, match=r"of another measurement \(seed was 3, is 4\)"):
        run_headroom(replace(config, seed=4), output=output)


def test_the_adapter_is_the_untuned_prompter(config, tmp_path):
    model = load_model(config.prompter, threads=2)
    weights = initial_weights(model, LoraConfig(rank=2), seed=0)
    draw = np.random.default_rng(0)
    for _, b in weights.matrices.values():
        b[:] = draw.normal(scale=0.3, size=b.shape)
    save_peft(tmp_path / "adapter", weights)
    prompter = dataclasses.replace(config.prompter, adapter=str(tmp_path / "adapter"))
    changed = dataclasses.replace(config, prompter=prompter)
    report = to_json(run_headroom(changed))
    adapted, base = runs.rewards_of(rollout(config, weights)), runs.rewards_of(rollout(config))
    assert report["untuned_reward"] == pytest.approx(adapted.mean())
    assert abs(adapted.mean() - base.mean()) > 1e-3


def test_more_prompts_than_there_are(config, tmp_path):
    changed = dataclasses.replace(config, num_prompts=1000, prompter="no such model")
    rows = [{"prompt": f"What is {number}?"} for number in range(5)]
    (tmp_path / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    five = DataConfig(str(tmp_path / "five.jsonl"))
    assert len(load_rows(HeadroomConfig(data=five))) == 5  # nobody asked for the 48 of the default
    with pytest.raises(ValueError, match="num_prompts: everyday has 96 rows, 1000 asked for"):
        run_headroom(changed)


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def settings(config):
    return [
        f"prompter={config.prompter.model}", "reward=letter_reward:count_e", "num_prompts=3",
        "num_rewrites=3", "num_responses=2", "rewrite.max_new_tokens=4",
        "response.max_new_tokens=4", "threads=2",
    ]  # fmt: skip


def test_the_command(config, tmp_path):
    files = {name: tmp_path / name for name in ("h.json", "h.png", "s.jsonl")}
    options = ["--output", files["h.json"], "--plot", files["h.png"], "--samples", files["s.jsonl"]]
    result = invoke("headroom", *settings(config), *options)
    assert "Optimum by kl_coef" in result.stdout and "Untuned prompter: reward" in result.stdout
    assert json.loads(files["h.json"].read_text())["num_prompts"] == 3
    assert files["h.png"].read_bytes().startswith(b"\x89PNG")
    # Again from the samples, with another grid.
    again = tmp_path / "again.json"
    options = ["kl_coefs=[5]", "--samples", files["s.jsonl"], "--output", again]
    invoke("headroom", *settings(config), *options)
    assert [p["kl_coef"] for p in json.loads(again.read_text())["frontier"]] == [5.0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["kl_coefs=[]"], "kl_coefs: expected at least one number"),
        (["kl_coefs=[0.1,0]"], "kl_coefs[1]: expected above 0, got 0.0"),
        (["num_rewrites=1"], "num_rewrites: expected at least 2"),
        (["rewrite.top_k=5"], "rewrite.top_k: expected 0: the untruncated distribution"),
        (
            ["prompter.adapter=none"],
            "prompter.adapter: none: no adapter_config.json there; expected",
        ),
        (["--output", "here/x.json"], "here: no such folder"),
        (["--output", "x", "--plot", "x"], "expected a file for each, got one twice"),
    ],
)
def test_bad_input_is_one_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = invoke("headroom", "prompter=nowhere", *arguments, code=2).stderr
    assert error.count("\n") == 1 and line in error
    assert list(tmp_path.iterdir()) == []
