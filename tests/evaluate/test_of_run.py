"""Measurements of a run: what comes from it, what is kept of them, and what is said to differ."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import BoundConfig, EvalConfig, HeadroomConfig, from_mapping, unchecked
from alignpro.evaluate.of_run import settings_of_run
from alignpro.evaluate.run import run_evaluate
from alignpro.pipeline import Pipeline
from alignpro.run_directory import error_notes

PROMPTS = ("tides", "bees", "rain", "rust", "moss", "owls", "salt", "fog")


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """A folder with a warm start, a run that began with it, and a run of the target."""
    folder = tmp_path_factory.mktemp("of-run")
    shutil.copytree(tiny_model_dir("llama"), folder / "model")
    rows = [
        {
            "prompt": f"tell me about {what}",
            "split": "heldout" if i % 2 else "train",
            "instruction": "be kind",
        }
        for i, what in enumerate(PROMPTS)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"prompter={folder / 'model'}", f"data={folder / 'p.jsonl'}", "threads=2"]
    common += ["lora.rank=2", "steps=2", "prompting.template=say {prompt}", "date=2026-11-28"]
    invoke("sft", *common, f"run_dir={folder / 'sft'}", "batch_size=2")
    common += ["reward=letter_reward:count_e", "prompts_per_step=2", "num_rewrites=2", "seed=3"]
    common += ["rewrite.max_new_tokens=4", "response.max_new_tokens=5", "kl_coef=0.07"]
    (folder / "empty.yaml").write_text("{}")
    warm = f"prompter.adapter={folder / 'sft' / 'adapter'}"
    invoke("train", folder / "empty.yaml", *common, warm, f"run_dir={folder / 'run'}")
    target = ["policy=target", "prompter.adapter=null", f"run_dir={folder / 'oracle'}"]
    invoke("train", folder / "empty.yaml", *common, *target)
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of it, to be changed."""
    for name in ("run", "sft", "oracle", "model"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "p.jsonl", tmp_path)
    return tmp_path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_what_a_measurement_takes_from_a_run(place):
    run = place / "run"
    for cls in (EvalConfig, HeadroomConfig, BoundConfig):
        config = from_mapping(cls, {}, base=settings_of_run(cls, run))
        assert config.prompter.adapter == str(run / "reference")
        assert (config.reward, config.seed, config.date) == (
            *("letter_reward:count_e", 3, "2026-11-28"),
        )
        assert (config.rewrite.max_new_tokens, config.response.max_new_tokens) == (4, 5)
        assert config.prompting.template == "say {prompt}"
        assert config.data.split == unchecked(cls, {}).data.split  # its own
        if cls is not HeadroomConfig:
            assert (config.trained, config.tuned) == (str(run / "adapter"), None)
            assert config.kl_coef == 0.07
    tuned = from_mapping(EvalConfig, {}, base=settings_of_run(EvalConfig, place / "oracle"))
    assert (tuned.tuned, tuned.trained) == (str(place / "oracle" / "adapter"), None)
    warm = from_mapping(EvalConfig, {}, base=settings_of_run(EvalConfig, place / "sft"))
    assert (warm.prompter.adapter, warm.trained) == (str(place / "sft" / "adapter"), None)
    assert warm.data.path == "everyday"  # and no pairs
    over = {"prompter": {"context_length": 99}, "rewrite": {"temperature": 0.5}}
    config = from_mapping(EvalConfig, over, base=settings_of_run(EvalConfig, run))
    assert (config.prompter.context_length, config.rewrite.max_new_tokens) == (99, 4)
    assert config.prompter.adapter == str(run / "reference")


def test_evaluate_headroom_and_bound_of_a_run_are_in_its_report(place, caplog):
    run = place / "run"
    invoke("evaluate", "--run", run)
    invoke("headroom", "--run", run, "num_prompts=2", "num_rewrites=2", "data.split=heldout")
    invoke("bound", "--run", run, "num_prompts=2", "num_rewrites=2")
    assert caplog.messages == []
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation["arms"]) == ["raw", "untuned", "trained"]
    assert invoke("evaluate", "--run", run, code=2).stderr.count("is there already") == 1
    page = invoke("report", run).output
    assert "trained prompter" in page and (run / "report.html").is_file()
    # Everything in it is a run's, and goes with the run.
    invoke("train", place / "run" / "config.json", "--overwrite", "steps=1")
    assert not (run / "evaluation.json").exists()


def test_what_differs_from_the_run_is_said(place, caplog):
    run = place / "run"
    override = [
        "reward=letter_reward:count_e+0*vader",
        "rewrite.temperature=0.5",
        "data.split=train",
    ]
    invoke("evaluate", "--run", run, *override, "--output", place / "out.json")
    said = "\n".join(caplog.messages)
    assert "reward is 'letter_reward:count_e+0*vader' here, 'letter_reward:count_e' in" in said
    assert "rewrite.temperature is 0.5 here, 1.0 in the run" in said
    assert "4 of the 4 prompts were trained on, 'tell me about tides' among them" in said
    caplog.clear()
    path = place / "run" / "reference" / "adapter_model.safetensors"
    shutil.copy(place / "sft" / "adapter" / "adapter_model.safetensors", path)  # the same
    config = place / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    command = ["evaluate", f"prompter={place / 'model'}", f"trained={run / 'adapter'}"]
    command += [f"data={place / 'p.jsonl'}", "num_rewrites=1", "threads=2", "num_prompts=2"]
    command += ["reward=letter_reward:count_e", "rewrite.max_new_tokens=4"]
    invoke(*command, "response.max_new_tokens=5", "prompting.template=say {prompt}")
    said = "\n".join(caplog.messages)
    assert "adapter: trained for" in said
    assert "weights of the prompter" in said and "not what the run was made from" in said
    assert "adapter that training began with" not in said  # there is none here
    assert "rewrite" not in said and "trained on" not in said


def test_a_run_that_is_not_done_is_named(place):
    shutil.rmtree(place / "run" / "adapter")
    line = invoke("evaluate", "--run", place / "run", code=2).stderr
    assert "it is not done" in line and "run/config.json --resume` goes on with it" in line
    assert "no .alignpro-run in it" in invoke("bound", "--run", place / "model", code=2).stderr
    assert "no such folder" in invoke("headroom", "--run", place / "no", code=2).stderr


def config_of(place, **changes):
    base = settings_of_run(EvalConfig, place / "run")
    changes = {"num_rewrites": 1, "static": "be kind", "threads": 2, **changes}
    return from_mapping(EvalConfig, changes, base=base)


def test_an_evaluation_goes_on_with_the_arms_it_has(place, monkeypatch, caplog):
    search = {"instructions": None, "candidates": ["be brief", "be kind"], "budget": 40}
    options = {"static": search, "optimum": {"num_candidates": 2, "num_responses": 2}}
    whole = to_json_without_speed(run_evaluate(config_of(place, **options)))
    output = place / "out.json"

    def stop(name, done, total):
        if name == "trained":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        run_evaluate(config_of(place, **options), output=output, on_progress=stop)
    said = "static search, raw, static, untuned: kept; the same command goes on"
    assert error_notes(stopped.value) == [said]
    kept = place / "out.json.arms.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row.get("arm") for row in rows] == [None, "static search", "raw", "static", "untuned"]
    kept.write_text(kept.read_text() + '{"arm": "trained", "of": nu')  # as kill -9 leaves it
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "respond", None)  # nobody asks the target for raw prompts again
        patch.setattr("alignpro.evaluate.run.search_static", None)
        parts = run_evaluate(config_of(place, **options), output=output)
    assert to_json_without_speed(parts) == whole
    assert caplog.messages == []
    # What an arm alone depends on is made anew; the others stay.
    monkeypatch.setattr(Pipeline, "respond", None)
    run_evaluate(config_of(place, **{**options, "static": "be sad"}), output=output)
    assert caplog.messages == [f"{kept}: static is made anew: it was another one"]


def to_json_without_speed(evaluation):
    from alignpro.evaluate.results import to_json

    plain = to_json(evaluation)
    del plain["tokens_per_second"]
    return plain


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_rewrites": 2}, "num_rewrites was 1, is 2"),
        ({"response": {"temperature": 0.1}}, "response.temperature was 0.7, is 0.1"),
        ({"num_prompts": 3}, "p.jsonl: 4 rows then, 3 now; those that were there are the same"),
    ],
)
def test_arms_of_another_measurement_are_refused(place, changes, line):
    output = place / "out.json"
    run_evaluate(config_of(place), output=output)
    with pytest.raises(ValueError, match="of another measurement") as caught:
        run_evaluate(config_of(place, **changes), output=output)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    faster = config_of(place, prompter={"max_batch_rows": 8})
    run_evaluate(faster, output=output)  # how it runs changes no arm


def test_arms_of_other_rows_are_made_anew(place, caplog):
    """Which rows fit is no setting of theirs, and no row's own."""
    rows = (place / "p.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "why " * 200, "split": "heldout"})
    (place / "long.jsonl").write_text("\n".join([*rows, long]))
    output, asked = place / "out.json", {"data": str(place / "long.jsonl"), "optimum": None}
    with pytest.raises(ValueError, match=r"long\.jsonl, line \d+: in the prompter's template"):
        run_evaluate(config_of(place, **asked), output=output)
    assert not (place / "out.json.arms.jsonl").exists()  # or other settings would be refused
    left_out = run_evaluate(config_of(place, **asked, on_too_long="skip"), output=output)
    cut = run_evaluate(config_of(place, **asked, on_too_long="cut"), output=output)
    assert cut.arms["raw"].n == left_out.arms["raw"].n + 1
    assert "raw is made anew: it was another one" in caplog.text


def test_arms_of_yesterday_go_on_with_their_date(place, monkeypatch):
    config = config_of(place, date=None, trained=None, prompter={"adapter": None}, static=None)
    monkeypatch.setattr("alignpro.evaluate.run.today", lambda: "2026-11-28")
    run_evaluate(config, output=place / "out.json")
    monkeypatch.setattr("alignpro.evaluate.run.today", lambda: "2026-11-29")
    monkeypatch.setattr(Pipeline, "respond", None)
    again = run_evaluate(config, output=place / "out.json")
    assert again.evaluation_config["date"] == "2026-11-28"


def test_a_file_of_something_else_is_no_arms(place):
    (place / "out.json.arms.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(ValueError, match="line 1: expected an arm that was kept; move the file"):
        run_evaluate(config_of(place), output=place / "out.json")
    assert (place / "out.json.arms.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_samples_of_other_data_or_weights_are_refused(place):
    samples = place / "samples.jsonl"
    small = ["num_prompts=2", "num_rewrites=2", "num_responses=1", f"data={place / 'p.jsonl'}"]
    small.append(f"prompter.model={place / 'model'}")
    command = ["headroom", "--run", place / "run", *small, "--samples", samples, "--output"]
    invoke(*command, place / "a.json")
    invoke(*command, place / "b.json", "kl_coefs=[1.0]")
    data = place / "p.jsonl"
    text = data.read_text()
    data.write_text(text.replace("tides", "waves"))
    line = invoke(*command, place / "c.json", code=2).stderr
    assert "p.jsonl: 1 of 2 rows differ (row 0, counted from 0); name another file" in line
    data.write_text(text)
    config = place / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    line = invoke(*command, place / "d.json", code=2).stderr
    assert "weights of the prompter" in line and "not what they were drawn from" in line
    data.unlink()
    shutil.rmtree(place / "model")
    invoke(*command, place / "e.json")  # elsewhere, without either, they are still samples
