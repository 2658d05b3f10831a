"""The benchmarks run at toy size, and write what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

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


def test_generation_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    for benchmark, work in (
        ("decode", ["--batch", "1,3", "--new-tokens", "4", "--prompt-tokens", "5"]),
        ("prefill", ["--shape", "1x9,2x5"]),
        ("rollout", ["--prompts", "2"]),
        ("growth", ["--batch", "1,3", "--context", "32,64", "--compute", "float32,int8"]),
    ):
        file = tmp_path / f"{benchmark}.json"
        common = ["--model", str(smollm2_path), "--repeats", "1", "--json", str(file)]
        result = run("bench", benchmark, *common, *work)
        assert result.exit_code == 0, result.output
        report = json.loads(file.read_text("utf-8"))
        assert report["benchmark"] == benchmark and report["peak_rss_bytes"] > 0
        assert report["limits"]["fma_gflops"] > 0 and report["limits"]["read_gbps"] > 0
        rows = report["results"] if benchmark != "rollout" else [report]
        for row in rows:
            assert row["tokens_per_second"] > 0
        if benchmark == "decode":
            assert [row["batch"] for row in rows] == [1, 3]
            assert all(0 < row["fma_share"] < 1 and row["bytes_per_step"] > 0 for row in rows)
            assert 0 < report["load_seconds"] < report["cold_start_seconds"]
            other = tmp_path / "halves.json"
            common[-1] = str(other)
            halves = run("bench", "decode", *common, *work, "--batch", "1", "--kv-dtype", "float16")
            assert halves.exit_code == 0, halves.output
            report = json.loads(other.read_text("utf-8"))
            # A step reads 5 + 4 / 2 positions of K and V: 30 layers, 3 heads, 64 wide.
            saved = rows[0]["bytes_per_step"] - report["results"][0]["bytes_per_step"]
            assert report["kv_dtype"] == "float16" and saved == 7 * 2 * 30 * 3 * 64 * 2
        if benchmark == "growth":
            cells = [(1, 32), (3, 32), (1, 64)]
            assert [(row["batch"], row["context"]) for row in rows] == 2 * cells
        if benchmark == "rollout":  # the same draws: the same work
            generated = report["generated_tokens"]
            assert generated["interleaved"] == generated["barrier"]


def test_growth_is_drawn(tmp_path: Path, smollm2_path: Path):
    plot = tmp_path / "growth.svg"
    work = ["--model", str(smollm2_path), "--batch", "1,2", "--context", "32", "--repeats", "1"]
    assert run("bench", "growth", *work, "--plot", str(plot)).exit_code == 0
    assert "<svg" in plot.read_text("utf-8")
    again = run("bench", "growth", *work, "--plot", str(plot))
    assert again.exit_code == 2 and "is there already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "decode", "--batch", "1,x"], "--batch: expected numbers"),
        (["bench", "prefill", "--shape", "512"], "--shape: expected SEQUENCESxTOKENS"),
        (["bench", "score", "--shape", "300"], "--shape: expected VOCABULARYxHIDDEN"),
        (["bench", "step", "--model", "/no/such.gguf"], "such.gguf"),
        (["bench", "growth", "--batch", "1", "--context", "3", "--repeats", "1"], "context:"),
        (["bench", "growth", "--context", "64,99999", "--batch", "1"], "the model holds 8192"),
        (["bench", "growth", "--context", "64", "--compute", "float32,int3"], "compute: expected"),
        (["bench", "step", "--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output and result.output.strip().count("\n") == 0
