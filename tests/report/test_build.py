"""The report from what lies in a run's directory: `alignpro report`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.evaluate.results import Evaluation, from_json, to_json
from alignpro.report.build import build_report, load_report
from made_up_report import full_metrics, full_report

FULL = full_report()
EVALUATION = to_json(from_json(Evaluation, FULL, "full"))


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_metrics(folder):
    rows = "".join(json.dumps(row) + "\n" for row in full_metrics(5))
    (folder / "metrics.jsonl").write_text(rows, encoding="utf-8")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["report", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments):
    """The one line that was printed."""
    line = run(*arguments, code=2).stderr
    assert line.startswith("alignpro: ") and line.count("\n") == 1, line
    return line


def test_everything_in_the_directory_is_found_by_name(tmp_path):
    rest = {k: v for k, v in FULL.items() if k not in ("headroom", "bound", "config")}
    write(tmp_path / "report.json", rest)
    write(tmp_path / "headroom.json", FULL["headroom"])
    write(tmp_path / "bound.json", FULL["bound"])
    write(tmp_path / "config.json", FULL["config"])
    write_metrics(tmp_path)
    result = run(tmp_path)
    assert result.output.endswith(f"report: {tmp_path / 'report.html'}\n")
    assert "The static instruction wins" in " ".join(result.output.split())
    report, metrics = load_report(tmp_path)
    assert to_json(report) == FULL
    assert metrics == full_metrics(5)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for section in ("arms", "judge", "training", "headroom", "bound", "samples", "costs"):
        assert f'id="{section}"' in page
    run(tmp_path)  # again: the page that is there is one of ours


def test_files_given_by_name_go_first(tmp_path):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "headroom.json", {"frontier": [], "num_prompts": 1})
    evaluation = write(tmp_path / "e.json", EVALUATION)
    headroom = write(tmp_path / "h.json", {"headroom": FULL["headroom"], "model": "x"})
    bound = write(tmp_path / "b.json", {"bound": FULL["bound"]})
    out = tmp_path / "out.html"
    run(
        tmp_path / "run",
        *("--evaluation", evaluation, "--headroom", headroom, "--bound", bound, "--output", out),
    )
    assert "The bound holds" in out.read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "report.html").exists()
    report, _ = load_report(tmp_path / "run", evaluation=evaluation, headroom=headroom, bound=bound)
    for part in ("headroom", "bound", "arms"):
        assert to_json(report)[part] == FULL[part]


def test_what_is_measured_comes_from_one_evaluation(tmp_path):
    write(tmp_path / "report.json", FULL)
    arms = {"raw": FULL["arms"]["raw"]}
    rest = {"paired": {}, "samples": [], "tokens_per_second": 1.0}
    write(tmp_path / "evaluation.json", {"arms": arms, **rest})
    report = to_json(load_report(tmp_path)[0])
    assert report["arms"] == arms and report["samples"] == []
    assert not {"judge", "gap_closed"} & set(report) and report["kl_per_rewrite"] is None
    assert report["versions"] == FULL["versions"]  # of the run, not of what it measured


def test_a_run_that_was_only_trained(tmp_path):
    write_metrics(tmp_path)
    write(
        tmp_path / "config.json", {"prompter": {"model": "smollm2"}, "reward": "vader", "seed": 7}
    )
    built = build_report(tmp_path)
    page = built.path.read_text(encoding="utf-8")
    assert 'id="training"' in page and 'id="arms"' not in page
    assert "model smollm2, reward vader, seed 7" in page
    assert "Not known yet: no held-out evaluation" in page


@pytest.mark.parametrize(
    ("files", "arguments", "line"),
    [
        ({}, [], "nothing to report; expected report.json, evaluation.json, safety.json, metrics"),
        ({"config.json": {}}, [], "nothing to report"),
        ({"report.json": FULL}, ["--evaluation", "gone.json"], "gone.json: no such file"),
        ({"report.json": FULL}, ["--headroom", "gone.json"], "gone.json: no such file"),
        ({"report.json": FULL}, ["--bound", "gone.json"], "gone.json: no such file"),
        ({"report.json": FULL}, ["--output", "nowhere/r.html"], "nowhere: no such folder"),
        ({"report.json": [1]}, [], "report.json: expected a JSON object, got list"),
        ({"evaluation.json": {"x": 1}}, [], "evaluation.json: not what `alignpro evaluate` writes"),
        ({"headroom.json": EVALUATION}, [], "headroom.json: not what `alignpro headroom` writes"),
        ({"bound.json": FULL["headroom"]}, [], "bound.json: not what `alignpro bound` writes"),
        ({"report.json": {"arms": {"raw": {}}}}, [], "arms.raw.mean_reward: expected a number"),
        ({"report.json": {"seconds": {"x": "1"}}}, [], "seconds.x: expected a number, got '1'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(files, arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in files.items():
        write(tmp_path / name, value)
    assert line in refused(tmp_path, *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_nothing_of_others_is_overwritten(tmp_path):
    assert "no such folder" in refused(tmp_path / "gone")
    write(tmp_path / "report.json", FULL)
    for page in ("report.html", "thesis.html"):
        (tmp_path / page).write_text("mine")
        options = [] if page == "report.html" else ["--output", tmp_path / page]
        assert "is no report; name another file" in refused(tmp_path, *options)
        assert (tmp_path / page).read_text() == "mine"
    assert "is no report" in refused(tmp_path, "--output", tmp_path)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe<html>")
    assert "report.json: not JSON" in refused(tmp_path)
