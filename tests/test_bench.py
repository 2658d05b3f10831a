"""The benchmarks run at toy size, and write what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignpro.bench.work import WORK
from alignpro.cli import app

SCORE = ["bench", "score", "--shape", "300x16", "--tokens", "12", "--repeats", "2"]


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_score_writes_every_figure(tmp_path: Path):
    file = tmp_path / "score.json"
    result = run(*SCORE, "--no-peers", "--threads", "1", "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text("utf-8"))
    assert report["limits"]["fma_gflops"] > 0 and report["limits"]["read_gbps"] > 0
    (head,) = report["heads"]
    assert (head["vocab_size"], head["hidden_size"], head["num_tokens"]) == (300, 16, 12)
    ours = next(row for row in head["implementations"] if row["name"] == "alignpro")
    for phase in ("forward", "forward_backward"):
        assert ours[phase]["seconds"] > 0 and ours[phase]["gflops"] > 0
        assert 0 < ours[phase]["fma_share"] < 2
    assert report["lora_pass"] is None


def test_a_peer_is_measured_or_says_why_not(tmp_path: Path):
    file = tmp_path / "score.json"
    assert run(*SCORE, "--json", str(file)).exit_code == 0
    rows = json.loads(file.read_text("utf-8"))["heads"][0]["implementations"]
    assert len(rows) > 4
    for row in rows:
        assert row["skipped"] or row["forward_backward"]["seconds"] > 0, row["name"]


def test_the_peer_script_does_the_same_work():
    """It reads the sizes from where ours does, and has none of its own."""
    text = (Path(__file__).parent / "bench" / "peers" / "trl_step.py").read_text("utf-8")
    for size in ("rewrites", "rewrite_tokens", "response_tokens", "lora_rank", "kl_coef"):
        assert hasattr(WORK, size) and f"WORK.{size}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "score", "--shape", "300"], "--shape: expected VOCABULARYxHIDDEN"),
        (["bench", "step", "--model", "/no/such.gguf"], "such.gguf"),
        (["bench", "step", "--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output and result.output.strip().count("\n") == 0
