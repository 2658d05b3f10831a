"""`alignpro extract` over tiny models: rows, numbers, what is kept, and what is refused."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import (
    ClientConfig,
    DataConfig,
    ExtractConfig,
    ModelConfig,
    Prompting,
    SchemaConfig,
    SftConfig,
    TrainConfig,
)
from alignpro.data.files import DataError
from alignpro.evaluate import extract as module
from alignpro.evaluate.extract import extract_of_run, line_of, measure, run_extract
from alignpro.extract.check import Violation
from alignpro.extract.draw import Extraction
from alignpro.extract.schema import read_schema
from alignpro.prompter import Prompter
from alignpro.report.extraction import extract_view
from alignpro.train.run import run_sft, run_train
from alignpro.types import SamplingParams, Usage
from chat_server import ChatServer, Fault
from native_runs import save_run

SCHEMA = {"fields": {"who": "text", "n": "integer"}, "checks": ["in_text(n)"]}
TEXTS = [("Ana has 3 cats.", "Ana", 3), ("Ben has 4 dogs.", "Ben", 4), ("Cleo has 5.", "Cleo", 5)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who.json").write_text(json.dumps(SCHEMA))
    rows = [{"text": text, "record": {"who": who, "n": n}} for text, who, n in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(model, **options):
    return ExtractConfig(
        schema=SchemaConfig("who.json", "lines"),
        data=DataConfig("texts.jsonl", split=None, prompt="text"),
        **{
            "target": ModelConfig(str(model)),
            "response": SamplingParams(max_new_tokens=6),
            "threads": 1,
            "attempts": 2,
            **options,
        },
    )


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["extract", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command_writes_a_row_a_text_and_its_numbers(here, tiny_model_dir):
    model = tiny_model_dir("llama")
    run(
        *("texts.jsonl", "response.max_new_tokens=5", "--schema", "who.json", "--attempts", "2"),
        *("--model", model, "--threads", "1", "--output", "out.jsonl", "--report", "report.json"),
    )
    rows = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [text for text, *_ in TEXTS]
    for row in rows:
        assert row["record"] is None and not row["verified"] and row["attempts"] == 2
        assert row["violations"][0]["check"] == "parse"
    report = json.loads((here / "report.json").read_text())
    assert report["verified"]["mean"] == 0 and report["f1"]["mean"] == 0
    assert report["config"]["data"]["path"] == "texts.jsonl"
    assert not list(here.glob("*.rows.jsonl")) and not list(here.glob("*.lock"))
    again = run("texts.jsonl", "--schema", "who.json", "--output", "out.jsonl", code=2)
    assert "out.jsonl: is there already" in again.output


def test_what_was_interrupted_goes_on_with_what_is_done(here, tiny_model_dir, monkeypatch):
    model = tiny_model_dir("llama")
    whole, _ = run_extract(config(model), output=here / "whole.jsonl")
    real = module._KeptRows.put

    def once(self, number, extraction):
        real(self, number, extraction)
        raise KeyboardInterrupt

    monkeypatch.setattr(module._KeptRows, "put", once)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_extract(config(model), output=here / "out.jsonl")
    assert "1 of 3 texts are done" in stopped.value.__notes__[0]
    kept = here / "out.jsonl.rows.jsonl"
    assert len(kept.read_text().splitlines()) == 2 and not (here / "out.jsonl").exists()
    monkeypatch.setattr(module._KeptRows, "put", real)
    with pytest.raises(ValueError, match="other settings"):
        run_extract(config(model, seed=1), output=here / "out.jsonl")
    asked = []
    monkeypatch.setattr(
        module.Pipeline,
        "extract",
        lambda self, texts, *a, extract=module.Pipeline.extract, **k: (
            asked.extend(texts), extract(self, texts, *a, **k),
        )[1],
    )  # fmt: skip
    rows, _ = run_extract(config(model), output=here / "out.jsonl")
    assert len(asked) == 2 and rows == whole
    assert (here / "out.jsonl").read_text() == (here / "whole.jsonl").read_text()
    kept.write_text("{}\nx\n")
    with pytest.raises(ValueError, match=r"other settings|expected a row"):
        run_extract(config(model), output=here / "out.jsonl")


def test_what_was_interrupted_goes_on_on_another_day(here, tiny_model_dir, monkeypatch):
    model = tiny_model_dir("llama")
    real = module._KeptRows.put

    def once(self, number, extraction):
        real(self, number, extraction)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "today", lambda: "2026-03-01")
    monkeypatch.setattr(module._KeptRows, "put", once)
    with pytest.raises(KeyboardInterrupt):
        run_extract(config(model), output=here / "out.jsonl")
    monkeypatch.setattr(module._KeptRows, "put", real)
    monkeypatch.setattr(module, "today", lambda: "2026-03-02")
    _, report = run_extract(config(model), output=here / "out.jsonl")
    assert report.config["date"] == "2026-03-01"


def test_a_first_line_that_a_crash_cut_short_is_begun_anew(here, tiny_model_dir, monkeypatch):
    model = tiny_model_dir("llama")
    kept = here / "out.jsonl.rows.jsonl"
    kept.write_text('{"config": {"seed"')
    seen = []
    real = module._KeptRows.put
    monkeypatch.setattr(
        module._KeptRows,
        "put",
        lambda self, *of: (real(self, *of), seen.append(kept.read_text().splitlines()[0])),
    )
    run_extract(config(model), output=here / "out.jsonl")
    assert len(seen) == 3 and all(json.loads(line)["config"]["seed"] == 0 for line in seen)


def test_a_target_that_was_taught_is_taken_from_its_run(here, tiny_model_dir):
    taught = SftConfig(
        prompter=ModelConfig(str(tiny_model_dir("llama"))),
        data={"path": "texts.jsonl", "prompt": "text"},
        schema=SchemaConfig("who.json", "lines"),
        run_dir="taught",
        steps=2,
        batch_size=2,
        threads=1,
    )
    run_sft(taught)
    written = json.loads((here / "taught" / "config.json").read_text())
    assert "- who: text" in written["prompting"]["template"]
    found = extract_of_run(here / "taught")
    assert found.target.adapter == "taught/adapter" or found.target.adapter.endswith("adapter")
    assert found.schema == SchemaConfig("who.json", "lines") and found.prompter is None
    with pytest.raises(ValueError, match="this one taught extraction"):
        Prompter.from_run("taught")
    output = run(
        *("texts.jsonl", "--run", "taught", "response.max_new_tokens=5", "--output", "out.jsonl")
    ).output
    assert "3 texts" in output and "F1 of values" in output
    shown = run("--run", "taught", "--show-template").output
    assert shown.count("{prompt}") == 1 and "- n: a whole number" in shown


def test_a_wrong_record_is_not_taught(here, tiny_model_dir):
    (here / "texts.jsonl").write_text(
        '{"text": "Ana has 3 cats.", "record": {"who": "Ana", "n": 4}}\n'
    )
    wrong = SftConfig(
        prompter=ModelConfig(str(tiny_model_dir("llama"))),
        data={"path": "texts.jsonl", "prompt": "text"},
        schema=SchemaConfig("who.json"),
        steps=1,
    )
    with pytest.raises(DataError, match=r"texts.jsonl, line 1, column 'record': n: in_text"):
        run_sft(wrong)


def test_a_trained_prompter_writes_before_each_draw(here, tiny_model_dir):
    base = tiny_model_dir("llama")
    folder = save_run(here / "trained", base, new_tokens=3, reward="schema:who.json#lines")
    found = extract_of_run(folder)
    assert found.schema == SchemaConfig("who.json", "lines")
    assert found.prompter is not None and found.prompter.adapter == str(folder / "adapter")
    result = run(
        *("texts.jsonl", "response.max_new_tokens=5", "--run", folder, "--output", "out.jsonl"),
        *("--attempts", "1", "--threads", "1"),
    )
    assert "3 texts" in result.output


def test_a_prompter_is_trained_by_the_verifier_alone(here, tiny_model_dir):
    """Its target reads texts in the schema's template, the prompter and the reward without it."""
    rows = [{"text": f"Dev has {n} eggs.", "record": {"who": "Dev", "n": n}} for n in (6, 7)]
    (here / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = read_schema("who.json")
    config = TrainConfig(
        prompter=ModelConfig(str(tiny_model_dir("llama"))),
        data={"path": "texts.jsonl", "prompt": "text"},
        reward="schema:who.json#lines",
        prompting=Prompting(target_template=schema.template("lines")),
        heldout={
            "data": {"path": "held_out.jsonl", "split": None, "prompt": "text"},
            "num_prompts": None,
        },
        run_dir="rl",
        steps=1,
        prompts_per_step=2,
        num_rewrites=2,
        rewrite=SamplingParams(max_new_tokens=3),
        response=SamplingParams(max_new_tokens=5),
        threads=1,
    )
    trainer = run_train(config)
    row = json.loads((here / "rl" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(row["heldout"]["components"]) == {"valid", "schema", "checks", "f1"}
    assert trainer.pipeline.prompting.target_template == schema.template("lines")
    assert extract_of_run(here / "rl").schema == SchemaConfig("who.json", "lines")
    with pytest.raises(ValueError, match=r"prompting\.target_template"):
        Prompter.from_run(here / "rl")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["texts.jsonl"], "schema: expected a schema"),
        (["--schema", "who.json"], "data.path: expected a source"),
        (["texts.jsonl", "--schema", "nowhere.json"], "no such file"),
        (["nowhere.jsonl", "--schema", "who.json"], "there is no such file"),
        (["texts.jsonl", "--schema", "who.json", "--format", "yaml"], "schema.format"),
        (["texts.jsonl", "--schema", "who.json", "data.prompt=body"], "no column 'body'"),
        (["texts.jsonl", "--schema", "who.json", "--run", "nowhere"], "the directory of a run"),
        (["bad.jsonl", "--schema", "who.json"], "bad.jsonl, line 2, column 'record'"),
        (["texts.jsonl", "--schema", "bad.json"], "bad.json: fields.a: unknown type"),
    ],
)
def test_bad_input_is_one_line(here, arguments, said):
    (here / "bad.jsonl").write_text('{"text": "a", "record": {}}\n{"text": "b", "record": [1]}\n')
    (here / "bad.json").write_text('{"fields": {"a": "texts"}}')
    result = run(*arguments, "--dry-run", code=2)
    assert said in result.output and result.output.count("\n") == 1


def test_a_dry_run_loads_nothing_and_says_what_it_would_take(here):
    said = run("texts.jsonl", "--schema", "who.json", "--attempts", "3", "--dry-run").output
    assert said.startswith("3 texts, 9 draws at most of 256 tokens; schema record: 2 fields")


def test_half_a_character_is_written_as_its_escape():
    assert line_of({"a": "70 °C"}) == '{"a": "70 °C"}'
    assert line_of({"a": "\ud800 °"}) == '{"a": "\\ud800 \\u00b0"}'


def test_texts_without_an_answer_count_in_no_share(here, monkeypatch):
    def answer(asked):
        if "Ben" in asked.turn:
            return Fault.error(400, "not this one")
        return Fault.reply("who: Ana\nn: 3" if "Ana" in asked.turn else "x", usage=(10, 5))

    with ChatServer(answer) as server:
        client = ClientConfig(input_price=1.0, output_price=2.0)
        target = ModelConfig("big", endpoint=server.url, max_failed=0.5, client=client)
        settings = config("big", target=target, attempts=1)
        rows, report = run_extract(settings, output=here / "out.jsonl")
    assert [row.get("answered", True) for row in rows] == [True, False, True]
    assert (report.texts, report.failed_texts, report.verified.mean) == (2, 1, 0.5)
    assert report.target_usage == Usage(20, 10, pytest.approx(40e-6))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(extract_view(report))
    said = console.export_text()
    assert "1 more texts without an answer, left out" in said
    assert "target: 20 tokens read, 10 written, cost 4e-05" in said


def test_the_numbers_by_hand():
    schema = read_schema(SCHEMA)
    wrong = (Violation("n", "in_text(n)", 9.0, ""),)
    done = [
        Extraction({"who": "Ana", "n": 3}, (), 1, ""),
        Extraction({"who": "Ben", "n": 4}, (), 3, ""),
        Extraction({"who": "Cleo", "n": 4}, (), 1, ""),  # verified, and not right
        Extraction({"who": "Dev", "n": 9}, wrong, 4, ""),
        Extraction(None, (Violation("", "parse"),), 4, ""),
    ]
    truths = [
        {"who": w, "n": n}
        for w, n in zip(("Ana", "Ben", "Cleo", "Dev", "Elif"), (3, 4, 5, 6, 7), strict=True)
    ]
    report = measure(done, truths, schema, ExtractConfig(schema=SchemaConfig("x"), attempts=4))
    assert report.verified.mean == 0.6 and report.verified_first.mean == 0.4
    assert report.verified_gain.mean == pytest.approx(0.2)
    assert report.attempts == 13 / 5 and report.records == 4
    assert report.violations == {"in_text(n)": 1, "parse": 1}
    assert (report.precision, report.recall) == (6 / 8, 6 / 10)
    assert report.f1.mean == pytest.approx(12 / 18)
    assert report.exact.mean == 0.4
    assert report.exact_of_verified.mean == pytest.approx(2 / 3)
    assert report.exact_of_verified.low < 0.2 and report.exact_of_verified.high > 0.98
    assert measure(done, None, schema, ExtractConfig()).f1 is None
