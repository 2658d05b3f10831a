"""The benchmarks run at toy size, and write what they promise."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from alignpro.bench.step import bench_step
from alignpro.bench.tables import step_table
from alignpro.bench.timeline import engine_flops
from alignpro.bench.work import StepWork
from alignpro.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_generation_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    for benchmark, work in (
        ("decode", ["--batch", "1,3", "--new-tokens", "4", "--prompt-tokens", "5"]),
        ("prefill", ["--shape", "1x9,2x5"]),
        ("rollout", ["--prompts", "2"]),
    ):
        file = tmp_path / f"{benchmark}.json"
        common = ["--model", str(smollm2_path), "--repeats", "1", "--output", str(file)]
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
        if benchmark == "rollout":
            assert report["generated_tokens"][0] >= 2 * 4 * 2 and len(report["all_seconds"]) == 1
            assert 0 < report["fma_share"] < 1 and report["gflops"] > 0


def test_a_step_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    work = StepWork(prompts=1, rewrites=2, rewrite_tokens=4, response_tokens=4)
    report = bench_step(model=smollm2_path, steps=1, threads=2, work=work)
    assert report["generated_tokens"] == 2 * 8 and report["parity_max_abs"] == 0.0
    assert 0 < report["generate_fma_share"] < 1
    assert report["seconds_per_step"] > report["seconds_by_stage"]["generate"] > 0
    Console(file=io.StringIO()).print(step_table(report))


def test_operations_are_those_of_the_engines_steps():
    events = {
        "names": ["step", "linear o", "forward"],
        "name": np.array([1, 0, 2, 1, 1, 0, 1]),
        "begin_ns": np.array([5, 10, 11, 12, 25, 30, 31]),
        "end_ns": np.array([6, 20, 19, 15, 26, 40, 35]),
        "flops": np.array([1000, 0, 0, 10, 2000, 0, 7]),
        "dropped": 0,
    }
    assert engine_flops(events) == 17 and engine_flops(events, since_ns=20) == 7
    assert engine_flops({**events, "dropped": 1}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "decode", "--batch", "1,x"], "--batch: expected numbers"),
        (["bench", "prefill", "--shape", "512"], "--shape: expected SEQUENCESxTOKENS"),
        (["bench", "step", "--model", "/no/such.gguf"], "such.gguf"),
        (["bench", "rollout", "--prompts", "1000"], "prompts: expected at most 96, got 1000"),
        (["bench", "decode", "--compute", "int3"], "compute: expected"),
        (["bench", "step", "--output", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output and result.output.strip().count("\n") == 0
