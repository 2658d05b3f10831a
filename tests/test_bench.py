"""The benchmarks run at toy size, and write what they promise."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from alignpro.bench.load import closed_loop, paced
from alignpro.bench.serve import _run
from alignpro.bench.soak import _checks, _Seen, bench_soak
from alignpro.bench.step import bench_step
from alignpro.bench.tables import new_table, step_table
from alignpro.bench.timeline import engine_flops
from alignpro.bench.work import StepWork
from alignpro.cli import app
from alignpro.interrupts import exit_status, interruptible
from native_runs import save_run
from serve.raw_upstream import RawUpstream


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_generation_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    for benchmark, work in (
        (
            "decode",
            ["--batch", "1,3", "--new-tokens", "4", "--prompt-tokens", "5", "--top-p", ".9"],
        ),
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
            assert all(row["fma_share"] > 0 and row["bytes_per_step"] > 0 for row in rows)
            assert rows[0]["fma_share"] == pytest.approx(
                rows[0]["gflops"] / report["limits"]["fma_gflops"]
            )
            assert 0 < report["load_seconds"] < report["cold_start_seconds"]
            assert [row["truncated_share"] > 0 for row in rows] == [True, True]
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
            assert report["fma_share"] > 0 and report["gflops"] > 0


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (
            "tokens/s|decode tokens/s|first token|GFLOP/s|of FMA peak|of reads|top-p 0.9, of plain",
            "64 x 2048 tokens|123,456|123,456|129.9 ms|1024|125%|125%|97%",
        ),
        (
            "tokens|plain|lookup|speedup|steps|accepted|bits",
            "random prompt|322 + 48|1026 / 1074|737 / 763|1.39|21.5|55% of 86%|same",
        ),
        ("time|share|calls", "between ops|101.5 ms|0.9%"),
        (
            "seen",
            "answers|1 of 4 requests lost; {'whole': 1}, such as whole: EOFError: " + "x" * 60,
        ),
    ],
)
def test_a_table_is_read_in_80_columns(columns: str, row: str):
    """In a terminal of so many, and in a log file; prose alone is wrapped."""
    out = io.StringIO()
    table = new_table("title", columns.split("|"), [row.split("|")])
    Console(file=out, width=80).print(table)
    lines = out.getvalue().splitlines()
    rows = [line for line in lines[2:] if line.strip()]
    rows = rows[1 + next(i for i, line in enumerate(rows) if "──" in line) :]
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
    assert "".join(row.split()).replace("|", "") == "".join("".join(rows).split())
    if max(map(len, row.split("|"))) < 80:
        assert len(rows) == 1


def test_a_step_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    work = StepWork(prompts=1, rewrites=2, rewrite_tokens=4, response_tokens=4)
    report = bench_step(model=smollm2_path, steps=1, threads=2, work=work)
    assert report["generated_tokens"] == 2 * 8 and report["parity_max_abs"] == 0.0
    assert report["generate_fma_share"] > 0  # of a limit that was measured at another moment
    assert report["seconds_per_step"] > report["seconds_by_stage"]["generate"] > 0
    Console(file=io.StringIO()).print(step_table(report))


def test_lookup_writes_every_figure(tmp_path: Path, smollm2_path: Path):
    file = tmp_path / "lookup.json"
    work = ["--model", str(smollm2_path), "--requests", "2", "--compute", "int8"]
    result = run("bench", "lookup", *work, "--output", str(file))
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(file.read_text("utf-8"))["results"]}
    assert list(rows) == ["copied", "asked again", "instruction", "random prompt"]
    for row in rows.values():
        assert row["bit_equal"] and 0 < row["plain"]["p50"] <= row["plain"]["p99"]
        assert row["speedup"] == row["plain"]["p50"] / row["lookup"]["p50"]
    assert rows["copied"]["accepted_share"] > 0.4 and rows["copied"]["steps"] < 30
    assert rows["asked again"]["steps"] < 10 and rows["random prompt"]["drafted_share"] < 0.5
    too_many = run("bench", "lookup", *work[:2], "--requests", "1000")
    assert too_many.exit_code != 0 and "requests: expected at most 34" in too_many.output


def test_serve_writes_every_figure(tmp_path: Path, tiny_model_dir):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    file, trained = tmp_path / "serve.json", tmp_path / "my-run"
    save_run(trained, tiny_model_dir("llama"), 4)
    work = ["--clients", "1,3", "--seconds", "0.3", "--rewrites", "17", "--run", str(trained)]
    result = run("bench", "serve", *work, "--repeats", "1", "--threads", "1", "--output", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text("utf-8"))
    assert report["benchmark"] == "serve" and "uvicorn" in report["machine"]["versions"]
    rows = {(row["answer"], row["clients"]): row for row in report["results"]}
    assert set(rows) == {(kind, n) for kind in ("whole", "stream") for n in (1, 3)}
    for row in rows.values():
        assert 0 < row["alone"]["p50"] <= row["alone"]["p99"]
        added = row["serve"]["p99"] - row["alone"]["p99"]
        assert row["added"]["p99"] == pytest.approx(added)
        assert row["rate"] == pytest.approx(row["closed_loop_rate"] / 4)
    rewritten = report["rewritten"]
    one, many = rewritten["results"]
    assert (one["clients"], many["clients"]) == (1, 16)
    for row in (one, many):
        assert 0 < row["rewrite"]["p50"] <= row["rewrite"]["p99"]
        assert sum(row["reasons"].values()) == 17
    speedup = many["requests_per_second"] / one["requests_per_second"]
    assert rewritten["speedup"] == pytest.approx(speedup)


def test_a_soak_of_seconds_holds(tmp_path: Path, tiny_model_dir):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    file, trained = tmp_path / "soak.json", tmp_path / "my-run"
    save_run(trained, tiny_model_dir("llama"), 4)
    report = bench_soak(run=trained, clients=8, seconds=4.0, reload_seconds=0.5, threads=1)
    assert report["reloads"] > 2 and min(report["requests"].values()) > 0
    for name in ("answers", "reloads", "files", "requests"):
        assert report["checks"][name]["holds"], report["checks"]
    assert report["memory"] and report["files"]
    result = run("bench", "soak", "--minutes", "0.02", "--clients", "2", "--output", str(file))
    said = json.loads(file.read_text("utf-8"))
    assert result.exit_code == (0 if said["holds"] else 3), result.output
    assert set(said["checks"]) == {"answers", "memory", "files", "requests"}


def test_a_soak_says_what_was_lost():
    seen = _Seen(asked=Counter({"whole": 3, "slow": 1}), lost=["whole: EOFError: x"], reloads=1)
    seen.failed_reloads.append("no adapter")
    seen.memory += [(half / 2, 2**20 * (100 + half)) for half in range(400)]
    found = dict(_checks(seen, 10, 12, 1))
    assert {name: check["holds"] for name, check in found.items()} == dict.fromkeys(found, False)
    assert found["answers"]["seen"] == (
        "1 of 4 requests lost; {'whole': 1}, such as whole: EOFError: x"
    )


@pytest.mark.parametrize(
    ("seconds", "mib", "holds"),
    [
        (60, lambda s: min(282 + 7 * s, 410) + 0.1 * s, True),  # the cache fills within 18 seconds
        (60, lambda s: min(282 + 3 * s, 410), None),  # and within 43
        (4, lambda s: 282, None),
        (60, lambda s: 282, True),
        (60, lambda s: 282 + 0.1 * s + 20 * (s > 40), False),
        (600, lambda s: min(282 + s, 410), True),  # ... 128
        (600, lambda s: 282 + s, False),
        (600, lambda s: 400 + 0.2 * s, False),  # so slow that it seems to stand still
    ],
)
def test_memory_is_judged_from_where_it_stood_still(seconds, mib, holds):
    memory = [(half / 2, round(2**20 * mib(half / 2))) for half in range(2 * seconds)]
    found = dict(_checks(_Seen(memory=memory), 10, 10, 0))["memory"]
    assert found["holds"] is holds and ("--minutes" in found["seen"]) == (holds is None)


@pytest.mark.filterwarnings("error")  # a coroutine that could not end
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_the_clients_do(number, capfd):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")

    def reply(got, send):
        time.sleep(0.02)
        send(OK)

    with RawUpstream(reply) as server, pytest.raises(KeyboardInterrupt) as interrupt:
        asked = itertools.repeat(b"GET / HTTP/1.1\r\n\r\n", 8000)
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        with interruptible():
            _run(closed_loop(server.port, asked, 16))
    gc.collect()
    assert exit_status(interrupt.value) == 128 + number
    assert capfd.readouterr().err == ""


async def served(answer: bytes, ask):
    """What ``ask`` gets from a port where every request gets the same bytes."""

    async def reply(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"!"):
                await asyncio.sleep(0.02)
                writer.write(answer)
        writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        return await ask(server.sockets[0].getsockname()[1])


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Name: a: b\r\n\r\nok"


def test_paced_requests_count_from_when_they_were_due():
    # One client asks every 10 ms and waits 20 ms for each answer: the n-th is late by n * 10 ms.
    answers = asyncio.run(served(OK, lambda port: paced(port, [b"!"] * 10, 1, 100.0)))
    assert answers[0].headers == {"content-length": "2", "x-name": "a: b"}
    assert len(answers) == 10 and answers[-1].seconds > 0.02 + 9 * 0.008
    fast = asyncio.run(served(OK, lambda port: closed_loop(port, [b"!"] * 10, 5)))
    assert len(fast) == 10 and min(one.seconds for one in fast) > 0.015


def test_an_answer_that_is_none_ends_the_measurement():
    refused = OK.replace(b"200 OK", b"503 Service Unavailable")
    with pytest.raises(RuntimeError, match=r"expected status 200, got 'HTTP/1\.1 503"):
        asyncio.run(served(refused, lambda port: closed_loop(port, [b"!"], 1)))


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
        (["bench", "serve", "--clients", "0"], "--clients: expected numbers"),
        (["bench", "serve", "--run", "/no/run"], "/no/run: expected the directory of a run"),
        (["bench", "step", "--output", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output and result.output.strip().count("\n") == 0
