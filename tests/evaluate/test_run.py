"""A configuration to a report, with every arm, on a tiny model; and what is refused before it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import ARMS, EvalConfig, ModelConfig, from_mapping, to_mapping
from alignpro.evaluate.results import to_json
from alignpro.evaluate.run import load_inputs, run_evaluate
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from alignpro.models.soft_prompt import SoftPrompt
from alignpro.statistics import length_controlled_win_rate
from chat_server import Fault
from judge_server import JudgeServer
from native_runs import lora

SHORT = "{prompt}\n{first}\n{second}\nA or B?"  # the tiny model's context is 256 tokens of a byte


@pytest.fixture(scope="module")
def files(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    model = load_model(tiny_model_dir("llama"), threads=2)
    for seed, name in enumerate(("trained", "tuned")):
        save_peft(folder / name, lora(model, seed=seed))
    words = model.base_table("embed_tokens")[model.tokenizer.encode("be brief")]
    save_peft(folder / "soft", SoftPrompt(words, "instruction", "\n\n"))
    rows = [
        {
            "prompt": f"tell me about {what}",
            "split": "heldout" if i % 2 else "train",
            "kind": "wet" if what in ("bees", "rust", "fog") else "dry",
        }
        for i, what in enumerate(("tides", "bees", "rain", "rust", "moss", "owls", "salt", "fog"))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, tiny_model_dir("llama")


def mapping(files, **changes):
    folder, model = files
    return {
        "prompter": str(model),
        "threads": 2,
        "data": str(folder / "prompts.jsonl"),
        "reward": "letter_reward:count_e",
        "num_rewrites": 2,
        "rewrite": {"max_new_tokens": 4},
        "response": {"max_new_tokens": 5},
        "trained": str(folder / "trained"),
        **changes,
    }


def everything(files, **changes):
    folder, model = files
    return mapping(
        files,
        soft=str(folder / "soft"),
        tuned=str(folder / "tuned"),
        static={"instructions": None, "candidates": ["be brief", "be kind"], "num_written": 2,
                "budget": 60},
        policy_text="If dry, be wet.",
        labelled={"instructions": {"wet": "be dry", "dry": ""}},
        optimum={"num_candidates": 3, "num_responses": 2},
        judge={"model": str(model), "num_prompts": 3},
        **changes,
    )  # fmt: skip


@pytest.fixture
def quick_judge(monkeypatch):
    few = functools.partial(length_controlled_win_rate, resamples=20)
    monkeypatch.setattr("alignpro.evaluate.judge.length_controlled_win_rate", few)
    monkeypatch.setattr("alignpro.evaluate.judge._QUESTION", SHORT)


def finite(value):
    """Whether JSON can hold it: no NaN and no infinity, at any depth."""
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def test_every_arm_and_a_local_judge(files, quick_judge, tmp_path):
    output = tmp_path / "report.json"
    seen = []
    config = from_mapping(EvalConfig, everything(files))
    report = to_json(run_evaluate(config, output=output, on_progress=lambda *row: seen.append(row)))
    assert list(report["arms"]) == list(ARMS)
    assert report["arms"]["labelled"]["empty_rewrites"] == 2  # owls, that is
    assert {"share", "gap"} <= report["static_to_labelled"].keys()
    assert set(report["paired"]) == {f"trained_minus_{n}" for n in ARMS if n != "trained"}
    for name, arm in report["arms"].items():
        assert (arm["n"], arm["num_responses"]) == (4, 8)
        assert ("copy_rate" in arm) == (name not in ("raw", "soft", "tuned"))
    assert set(report["soft_differences"]) == {f"soft_minus_{n}" for n in ARMS if n != "soft"}
    assert 0 <= report["arms"]["optimum"]["selection_reliability"] <= 1
    search = report["static_search"]
    assert search["instruction"] == report["arms"]["static"]["instruction"]
    assert search["train_prompts"] == 4 and search["responses"] <= 60
    assert report["gap_closed"].keys() >= {"share", "ci95", "gap"}
    assert report["kl_per_rewrite"] > 0 and report["kl_per_token"] > 0
    judged = report["judge"]
    assert set(judged["comparisons"]) == {f"trained_vs_{n}" for n in ("raw", "static", "untuned")}
    assert judged["failed"] == 0 and judged["questions"] > 0
    for result in judged["comparisons"].values():
        assert result["n"] == 3 == result["wins"] + result["ties"] + result["losses"]
    assert finite(report) and json.loads(json.dumps(report)) == report
    names = dict.fromkeys(name for name, _, _ in seen)
    assert list(names) == ["static search", *ARMS, "judge"]
    assert all(done <= total for _, done, total in seen)
    last = {name: (done, total) for name, done, total in seen}
    assert all(done == total for done, total in last.values())
    # The same again, with nothing left to ask.
    again = to_json(run_evaluate(config, output=output))
    assert again["judge"].pop("replayed") == judged["questions"]
    judged.pop("replayed")
    for each in (report, again):
        each.pop("tokens_per_second")
    assert again == report
    assert (tmp_path / "report.json.judge.jsonl").is_file()
    recorded = from_mapping(EvalConfig, report["evaluation_config"])
    assert recorded.date is not None and dataclasses.replace(recorded, date=None) == config


def test_the_tuned_target_is_the_adapter_on_the_target(files):
    folder, _ = files
    settings = mapping(files, tuned=str(folder / "tuned"), num_samples=4)
    report = to_json(run_evaluate(from_mapping(EvalConfig, settings)))
    assert list(report["arms"]) == ["raw", "untuned", "trained", "tuned"]
    raw, tuned = (
        [sample[f"response_{arm}"] for sample in report["samples"]] for arm in ("raw", "tuned")
    )
    assert raw != tuned


@pytest.mark.parametrize(
    ("changes", "arms"),
    [
        ({}, ["raw", "untuned"]),
        ({"tuned": "a"}, ["raw", "tuned"]),
        ({"soft": "a", "static": "be brief"}, ["raw", "static", "soft"]),
        ({"target": {"adapter": "a"}}, ["raw"]),
        ({"target": {"adapter": "a"}, "static": {"num_written": 0}}, ["raw", "static"]),
        # What asks for a prompter.
        ({"tuned": "a", "trained": "a"}, ["raw", "untuned", "trained", "tuned"]),
        ({"tuned": "a", "prompter": {"adapter": "a"}}, ["raw", "untuned", "tuned"]),
        ({"tuned": "a", "prompter": "small", "target": "big"}, ["raw", "untuned", "tuned"]),
        ({"tuned": "a", "target": "big"}, ["raw", "tuned"]),
        ({"tuned": "a", "prompter": "big"}, ["raw", "tuned"]),
        ({"tuned": "a", "optimum": {}}, ["raw", "untuned", "optimum", "tuned"]),
        ({"tuned": "a", "static": {}}, ["raw", "static", "untuned", "tuned"]),
        ({"tuned": "a", "require": ["tuned>untuned"]}, ["raw", "untuned", "tuned"]),
    ],
)
def test_base_weights_are_a_prompter_where_one_is_asked_for(changes, arms):
    config = from_mapping(EvalConfig, changes)
    of_target = [name for name in ("static", "optimum", "soft", "tuned") if getattr(config, name)]
    assert {"raw", *config.prompters, *of_target} == set(arms)


def test_targets_alone_are_compared_without_a_prompter(files, monkeypatch, tmp_path):
    """Which is then not loaded, and whose template is in no row's way."""
    folder, model = files
    loaded = []

    def load(config, *options, **named):
        loaded.append(config.name)
        return load_model(config if config.name == str(model) else target, *options, **named)

    monkeypatch.setattr("alignpro.models.native_model.load_model", load)
    target = ModelConfig(str(model), adapter=str(folder / "trained"))
    rows = (folder / "prompts.jsonl").read_text().splitlines()
    marked = [{**json.loads(row), "bad": i < 4, "forbidden": "e"} for i, row in enumerate(rows)]
    (folder / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    settings = mapping(
        files,
        trained=None,
        tuned=str(folder / "tuned"),
        prompter={},
        target=to_mapping(target),
        data=str(folder / "marked.jsonl"),
        safety={"where": "bad"},
        prompting={"template": "{prompt}" + " dry" * 300},
    )
    output = tmp_path / "report.json"
    report = run_evaluate(from_mapping(EvalConfig, settings), output=output)
    assert list(report.arms) == list(report.safety.arms) == ["raw", "tuned"]
    assert list(report.safety.paired_harm) == ["tuned_minus_raw"]
    assert loaded == [str(model)]
    with pytest.raises(ValueError, match="in the prompter's template"):
        run_evaluate(from_mapping(EvalConfig, {**settings, "require": ["tuned>untuned"]}))


def test_rows_that_are_an_instruction_are_the_static_arm(files):
    folder, _ = files
    changes = {
        "soft": str(folder / "soft"),
        "static": "be brief",
        "trained": None,
        "num_rewrites": 1,
    }
    report = to_json(run_evaluate(from_mapping(EvalConfig, mapping(files, **changes))))
    assert list(report["arms"]) == ["raw", "static", "soft"]
    soft, static, raw = (
        [sample[f"response_{arm}"] for sample in report["samples"]]
        for arm in ("soft", "static", "raw")
    )
    assert soft == static != raw
    matrices = from_mapping(EvalConfig, mapping(files, soft=str(folder / "tuned")))
    with pytest.raises(ValueError, match=r"soft: .*expected a soft prompt, got LoRA matrices"):
        run_evaluate(matrices)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"soft": "nothing/here"}, "soft: nothing/here: no adapter_config.json there"),
        ({"trained": "nothing/here"}, "trained: nothing/here: no adapter_config.json there"),
        ({"tuned": "nothing/here"}, "tuned: nothing/here: no adapter_config.json there"),
        ({"trained": None, "judge": {"model": "m"}}, "judge: it compares the trained prompter"),
        ({"judge": {}}, "judge.model: expected the judge's path or name"),
        ({"judge": {"model": "m", "base_url": "localhost:80"}}, "judge.base_url: expected an http"),
        ({"judge": {"model": "m", "num_pairs": 3}}, "judge.num_pairs: expected at most 2"),
        ({"judge": {"model": "m", "base_url": "http://x", "api_key_env": "NO_SUCH"}}, "NO_SUCH"),
        ({"judge": {"modle": "m"}}, 'key "judge.modle"; did you mean "judge.model"'),
        ({"static": {"budgt": 3}}, 'key "static.budgt"; did you mean "static.budget"'),
        ({"static": " "}, "static: expected an instruction or a search"),
        ({"static": 3}, "static: expected text or a mapping of fields or null, got 3"),
        ({"static": {"budget": 3}}, "static.budget: expected at least"),
        ({"static": {"data": {"split": "heldout"}}}, "4 of the 4 prompts to search on"),
        (
            {"static": {"budget_tokens": "auto"}, "trained": None},
            "static.budget_tokens: auto: expected a trained adapter with its run's metrics.jsonl",
        ),
        ({"static": {"budget_tokens": "auto"}}, "metrics.jsonl in the folder around it, got /"),
        ({"static": {"writers": ["tuned"]}}, "static.writers[0]: expected one of 'untuned', 'tra"),
        ({"policy_text": ""}, "policy_text: expected a text"),
        ({"labelled": {"instructions": ["x"]}}, "labelled.instructions: expected a mapping"),
        ({"labelled": {"instructions": {"wet": 1}}}, "labelled.instructions.wet: expected text"),
        (
            {"labelled": {"instructions": {"wet": "x"}}},
            "prompts.jsonl, line 6 ('tell me about owls'): kind 'dry' has no instruction; "
            "labelled.instructions has ['wet']",
        ),
        (
            {"labelled": {"column": "type"}},
            "prompts.jsonl, line 2 ('tell me about bees'): expected a label in column 'type'; "
            "there are ['kind', 'split']",
        ),
        ({"require": ["trained"]}, "require: expected ARM>ARM or ARM>ARM+MARGIN, got 'trained'"),
        ({"require": ["trained>raw+x"]}, "require: expected ARM>ARM or"),
        ({"require": ["trained>raw>static"]}, "require: expected ARM>ARM or"),
        ({"require": ["trained>stattic"]}, "got 'stattic'; did you mean \"static\"?"),
        ({"require": ["raw>raw"]}, "require: raw>raw: expected two arms, got one twice"),
        ({"require": ["trained>static"]}, "the arms raw, untuned, trained, got 'static'"),
        (
            {"require": ["trained>raw"], "trained": None},
            "require: trained>raw: expected one of the arms raw, untuned, got 'trained'",
        ),
        ({"optimum": {"num_candidates": 1}}, "optimum.num_candidates: expected at least 2"),
        ({"kl_coef": 0}, "kl_coef: expected above 0"),
        ({"seed": -1}, "seed: expected between 0 and"),
        ({"judge": {"model": "nowhere/at/all.gguf"}}, "nowhere/at/all.gguf"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(files, changes, line, monkeypatch):
    monkeypatch.setattr("alignpro.evaluate.run.load_models", None)
    with pytest.raises((ValueError, OSError)) as caught:
        run_evaluate(from_mapping(EvalConfig, mapping(files, **changes)))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_in_no_folder(files, tmp_path):
    judge = {"model": "m", "cache": str(tmp_path / "no" / "file")}
    with pytest.raises(FileNotFoundError, match=r"judge.cache: .*no such folder"):
        load_inputs(from_mapping(EvalConfig, mapping(files, judge=judge)))


def write_yaml(path, config):
    path.write_text(json.dumps(config))  # which YAML reads as well
    return path


def test_the_command_writes_and_prints_every_arm(files, quick_judge, tmp_path):
    config = write_yaml(tmp_path / "all.yaml", everything(files))
    output = tmp_path / "out.json"
    result = CliRunner().invoke(
        app, ["evaluate", str(config), "num_prompts=3", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert list(report["arms"]) == list(ARMS) and report["arms"]["raw"]["n"] == 3
    for name in ARMS:
        assert name.split("_")[0] in result.output


def test_the_gate_both_ways(files, tmp_path):
    """A difference of 9 letters in 5 tokens' answers is certain not to be there."""
    config = write_yaml(tmp_path / "c.yaml", mapping(files, require=["trained>raw-9"]))
    output = tmp_path / "out.json"

    def gate(*required):
        output.unlink(missing_ok=True)
        arguments = ["evaluate", str(config), "--output", str(output)]
        for one in required:
            arguments += ["--require", one]
        result = CliRunner().invoke(app, arguments)
        errors = [line for line in result.stderr.splitlines() if line.startswith("alignpro: ")]
        return result.exit_code, result.stdout, errors

    code, shown, _ = gate("untuned>raw-9.5")
    assert code == 0
    assert shown.startswith("Required: trained>raw-9: met, trained prompter minus raw prompt is ab")
    assert [one["met"] for one in json.loads(output.read_text())["required"]] == [True, True]
    code, shown, errors = gate("trained > raw + 9")
    assert code == 3 and errors == [] and "Required: trained > raw + 9: not met" in shown
    required = json.loads(output.read_text())["required"]
    assert [one["met"] for one in required] == [True, False]
    (tmp_path / "evaluation.json").write_text(output.read_text())
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert body.index("Required: trained &gt; raw + 9: not met") < body.index("<h1>")
    code, _, errors = gate("trained>row")
    assert code == 2 and len(errors) == 1 and 'did you mean "raw"?' in errors[0]


def test_a_search_spends_what_the_training_spent(files, tmp_path):
    folder, _ = files
    run = tmp_path / "run"
    shutil.copytree(folder / "trained", run / "adapter")
    log = run / "metrics.jsonl"
    static = {"instructions": None, "candidates": ["be brief", "be kind"], "num_written": 0,
              "budget_tokens": "auto"}  # fmt: skip
    config = from_mapping(
        EvalConfig, mapping(files, trained=str(run / "adapter"), static=static, num_samples=0)
    )
    log.write_text('{"step": 0, "reward_mean": 0.5}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl does not say how many tokens the target"):
        run_evaluate(config)
    log.write_text("".join(json.dumps({"step": i, "target_tokens": 100}) + "\n" for i in range(3)))
    search = to_json(run_evaluate(config))["static_search"]
    assert search["budget"] == 300 and 280 <= search["tokens"] <= 310


def test_a_judge_that_fails_costs_no_arm(files, quick_judge, tmp_path, monkeypatch):
    monkeypatch.setattr("judge_server.read_question", lambda _: {"prompt": "", "A": "", "B": ""})
    with JudgeServer(lambda asked: "A") as server:
        server.always = Fault(status=400, body='{"error": {"message": "no"}}')
        judge = {"model": "m", "base_url": server.url, "api_key_env": None}
        config = write_yaml(tmp_path / "c.yaml", mapping(files, judge=judge))
        output = tmp_path / "out.json"
        arguments = ["evaluate", str(config), "--output", str(output)]
        result = CliRunner().invoke(app, arguments)
        kept = tmp_path / "out.json.unjudged.json"
        *progress, error = result.stderr.splitlines()
        assert result.exit_code == 2 and not any("alignpro" in line for line in progress)
        assert "got no verdict" in error and str(kept) in error
        assert list(json.loads(kept.read_text())["arms"]) == ["raw", "untuned", "trained"]
        assert not output.exists()
        server.always = None  # it recovers
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        comparisons = json.loads(output.read_text())["judge"]["comparisons"]
        assert comparisons["trained_vs_raw"]["win_rate"] == 0.5
