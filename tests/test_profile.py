"""`alignpro profile`: its arithmetic on made-up steps, and what it records of real ones."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.bench.generation import _generate
from alignpro.bench.profile import record, rewrite_seeds
from alignpro.bench.request import PHASES
from alignpro.bench.tables import limit_share
from alignpro.bench.timeline import STAGES, Timeline, beyond
from alignpro.bench.work import random_prompts
from alignpro.cli import app
from alignpro.models.native_model import NativeModel, load_model
from alignpro.native import core
from alignpro.pipeline import Pipeline
from alignpro.trace import Span
from alignpro.types import Rollout, SamplingParams
from native_runs import lora, save_run

LIMITS = {"fma_gflops": 100.0, "read_gbps": 10.0}
LETTERS = "bcdefghij"


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Any) -> NativeModel:
    return load_model(tiny_model_dir("llama"), threads=2)


# --- made-up steps ---


def made_up(*rows: tuple[Any, ...], dropped: int = 0) -> dict[str, Any]:
    """Events as the engine reports them, from (name, begin, end, rows, key, flops, bytes)."""
    full = [(*row, *(0,) * (7 - len(row))) for row in rows]
    names = list(dict.fromkeys(row[0] for row in full))
    return {
        "names": names,
        "name": np.array([names.index(row[0]) for row in full], np.int32),
        "begin_ns": np.array([row[1] for row in full], np.int64),
        "end_ns": np.array([row[2] for row in full], np.int64),
        "thread": np.full(len(full), 7, np.int64),
        "rows": np.array([row[3] for row in full], np.int64),
        "key": np.array([row[4] for row in full], np.uint64),
        "flops": np.array([row[5] for row in full], np.int64),
        "bytes": np.array([row[6] for row in full], np.int64),
        "dropped": dropped,
    }


PROMPTER, TARGET = 2**64 - 1, 5  # seeds
EVENTS = made_up(
    # 100 ns, all prefill of the prompter: 3 + 1 rows, none drawn.
    ("prefill.rows", 1010, 1010, 3, PROMPTER),
    ("prefill.rows", 1011, 1011, 1, PROMPTER),
    ("linear o", 1020, 1060, 4, 0, 80, 400),
    ("forward", 1020, 1090, 4),
    ("sample", 1091, 1091, 0),
    ("step", 1000, 1100),
    # 80 ns, 20 of them drawing; rows 1, 2 and 5, of which one each is drawn of the first two.
    ("decode.rows", 1210, 1210, 1, PROMPTER),
    ("decode.drawn", 1210, 1210, 1, PROMPTER),
    ("prefill.rows", 1211, 1211, 2, TARGET),
    ("prefill.drawn", 1211, 1211, 1, TARGET),
    ("prefill.rows", 1212, 1212, 5, TARGET),
    ("linear o", 1220, 1230, 8, 0, 20, 100),
    ("forward", 1220, 1250, 8),
    ("head_sample", 1255, 1270, 2, 0, 300, 30),
    ("sample", 1252, 1272, 2),
    ("step", 1200, 1280),
    ("step", 1290, 1300),  # nothing to do
)
SPANS = [
    Span("hand-off", 1100, 1120, 7),
    Span("answer", 1280, 1285, 7),
    Span("reward", 1400, 1430, 7),
    Span("rollout", 900, 1500, 7),
]


def test_a_step_is_divided_by_rows_and_by_draws():
    timeline = Timeline(EVENTS, SPANS, [PROMPTER])
    assert timeline.steps == 2
    stages = {row["stage"]: row for row in timeline.stages()}
    assert tuple(stages) == STAGES
    expected = {
        "prompter prefill": 100.0,
        "prompter decode": 60 * 1 / 8 + 20 / 2,
        "hand-off": 20.0,
        "target prefill": 60 * 7 / 8 + 20 / 2,
        "target decode": 0.0,
        "reward": 30.0,
        "other": 600.0 - 100 - 80 - 20 - 30,
    }
    seconds = {name: row["seconds"] * 1e9 for name, row in stages.items()}
    assert seconds == pytest.approx(expected)
    assert sum(row["share"] for row in stages.values()) == pytest.approx(1.0)
    rows = [row["rows"] for row in stages.values()]
    assert rows == [4, 1, None, 7, 0, None, None]


def test_ops_beside_the_limits():
    between, linear, head = Timeline(EVENTS, SPANS, [PROMPTER]).ops(LIMITS)
    assert (linear["op"], linear["calls"], linear["flops"], linear["bytes"]) == (
        "linear o", 2, 100, 500,
    )  # fmt: skip
    assert linear["gflops"] == pytest.approx(2.0) and linear["gbps"] == pytest.approx(10.0)
    assert linear["fma_share"] == pytest.approx(0.02) and linear["read_share"] == pytest.approx(1)
    assert linear["share"] == pytest.approx(50 / 600)
    assert (head["op"], head["gflops"]) == ("head_sample", pytest.approx(20.0))
    # 70 + 30 forward and 20 drawing, less 50 and 15 in ops.
    assert between == {
        "op": "between ops",
        "seconds": pytest.approx(55e-9),
        "share": pytest.approx(55 / 600),
    }


def test_shares_above_a_limit_are_marked():
    ops = Timeline(EVENTS, SPANS, [PROMPTER]).ops(LIMITS)
    assert not any(beyond(op) for op in ops)
    slower = {name: value / 2 for name, value in LIMITS.items()}  # measured beside other work
    ops = Timeline(EVENTS, SPANS, [PROMPTER]).ops(slower)
    (above,) = (op for op in ops if beyond(op))
    assert above["op"] == "linear o" and above["read_share"] == pytest.approx(2)
    assert limit_share(above["read_share"]) == "200%*" and limit_share(1.0) == "100%"


def test_marks_of_a_step_that_was_dropped_count_for_no_other():
    late = [("prefill.rows", 1310, 1310, 9, TARGET), ("sample", 1320, 1390, 9)]
    early = [("prefill.rows", 950, 950, 9, TARGET)]
    rows = [
        (EVENTS["names"][n], b, e, r, k)
        for n, b, e, r, k in zip(
            *(EVENTS[c].tolist() for c in ("name", "begin_ns", "end_ns", "rows", "key")),
            strict=True,
        )
    ]
    timeline = Timeline(made_up(*early, *rows, *late), SPANS, [PROMPTER])
    assert timeline.stages() == Timeline(EVENTS, SPANS, [PROMPTER]).stages()


def test_work_with_a_root_and_stages_of_its_own():
    def span(name: str, begin: int, end: int) -> Span:
        return Span(name, begin, end, 7)

    spans = [
        span("route", 90, 95),  # of nobody
        span("route", 101, 104),
        span("queue", 104, 110),
        span("request", 100, 200),
    ]
    events = made_up(
        ("step", 40, 60), ("prefill.rows", 45, 45, 9, PROMPTER), ("linear o", 46, 50, 0, 0, 7, 70),
        ("step", 110, 150), ("prefill.rows", 111, 111, 3, PROMPTER),
        ("linear o", 112, 140, 0, 0, 100, 500), ("head_sample", 141, 149, 0, 0, 20, 40),
        ("step", 155, 165), ("decode.rows", 156, 156, 1, PROMPTER),
        ("linear o", 157, 164, 0, 0, 30, 400),
        ("step", 190, 210), ("decode.rows", 191, 191, 1, PROMPTER),  # not all of it is inside
    )  # fmt: skip
    stages = ("route", "queue", "prompter prefill", "prompter decode", "other")
    timeline = Timeline(events, spans, [PROMPTER], root="request", stages=stages)
    found = {row["stage"]: row["seconds"] * 1e9 for row in timeline.stages()}
    assert found == {
        "route": pytest.approx(3),
        "queue": pytest.approx(6),
        "prompter prefill": pytest.approx(40),
        "prompter decode": pytest.approx(10),
        "other": pytest.approx(41),
    }
    assert timeline.work()["prompter prefill"] == (120, 540)
    assert timeline.work()["prompter decode"] == (30, 400)
    assert timeline.seconds_of_steps("prompter decode") == pytest.approx([10e-9])


def test_nothing_but_a_rollout():
    timeline = Timeline(made_up(), SPANS[-1:], [])
    assert timeline.ops(LIMITS) == [] and timeline.steps == 0
    assert [row["seconds"] for row in timeline.stages()] == [0.0] * 6 + [pytest.approx(600e-9)]


def test_the_trace_of_made_up_steps(tmp_path: Path):
    path = tmp_path / "trace.json"
    Timeline(EVENTS, SPANS, [PROMPTER]).write_chrome_trace(path, {"model": "made up"})
    trace = json.loads(path.read_text("utf-8"))
    assert trace["otherData"] == {"model": "made up"}
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    second = next(e for e in complete if e["name"] == "step" and e["ts"] == 0.3)
    assert second == {
        "ph": "X", "pid": 1, "tid": 7, "name": "step", "ts": 0.3, "dur": 0.08,
        "args": {"prompter decode": 1, "target prefill": 7},
    }  # fmt: skip
    tracks = {
        e["tid"]: e["args"]["name"]
        for e in trace["traceEvents"]
        if e["name"] == "thread_name" and e["pid"] == 2
    }
    assert list(tracks.values()) == list(STAGES[:-1])
    shown = [(tracks[e["tid"]], e["ts"], e["args"]) for e in complete if e["pid"] == 2]
    assert ("prompter prefill", 0.1, {"rows": 4, "us": 0.1}) in shown
    assert ("hand-off", 0.2, {}) in shown and len(shown) == 5
    assert not any(e["name"].endswith((".rows", ".drawn")) for e in complete)


# --- real steps ---


def small_pipeline(prompter: NativeModel, target: NativeModel, **options: Any) -> Pipeline:
    def reward(prompts: Any, rewrites: Any, responses: Any, **columns: Any) -> list[float]:
        return [float(len(text)) for text in responses]

    params = SamplingParams(max_new_tokens=9, temperature=1.0)
    return Pipeline(
        prompter,
        target,
        reward,
        rewrite_params=params,
        response_params=replace(params, max_new_tokens=12),
        **options,
    )


def same(first: Rollout, second: Rollout) -> bool:
    return replace(first, seconds={}) == replace(second, seconds={})


def test_recording_changes_no_bit_and_misses_no_row(tiny_model_dir: Any, tiny: NativeModel):
    prompts = [letter * (3 + n) for n, letter in enumerate(LETTERS)]
    other = load_model(tiny_model_dir("qwen3"), threads=2)
    adapter = lora(tiny)
    for prompter, target in ((tiny, tiny), (tiny, other)):
        pipeline = small_pipeline(prompter, target, prompter_adapter=adapter)
        plain = pipeline.rollout(prompts, num_rewrites=3, seed=4)
        recorded, events, spans = record(pipeline, prompts, 3, 4, ops=True)
        assert same(plain, recorded)
        assert events["dropped"] == 0
        timeline = Timeline(events, spans, rewrite_seeds(4, len(prompts)))
        drawn = dict(zip(("pp", "pd", "tp", "td"), timeline.drawn.sum(0), strict=True))
        rewrites = [w for group in recorded.rewrites for w in group]
        assert drawn["pp"] + drawn["pd"] == sum(len(w.tokens) for w in rewrites)
        answers = [r for w in rewrites for r in w.responses]
        assert drawn["tp"] + drawn["td"] == sum(len(r.tokens) for r in answers)
        assert drawn["pp"] == len(rewrites) and drawn["tp"] == len(answers)


def test_stages_add_up_to_the_rollout(tiny: NativeModel):
    pipeline = small_pipeline(tiny, tiny)
    prompts = [letter * 9 for letter in LETTERS]
    before = tiny.stats()
    rollout, events, spans = record(pipeline, prompts, 2, 1, ops=True)
    after = tiny.stats()
    timeline = Timeline(events, spans, rewrite_seeds(1, len(prompts)))
    stages = timeline.stages()
    assert all(row["seconds"] > 0 for row in stages)
    # Timed apart, by the pipeline itself.
    assert sum(row["seconds"] for row in stages) == pytest.approx(
        sum(rollout.seconds.values()), rel=0.05
    )
    assert timeline.steps == after["steps"] - before["steps"]
    prefill = timeline.rows[:, [0, 2]].sum()
    assert prefill == after["prefill_tokens"] - before["prefill_tokens"]
    # Hand-off once a rewrite, an answer once a response.
    names = [span.name for span in spans]
    assert names.count("hand-off") == names.count("answer") == 2 * len(prompts)
    assert names.count("reward") == names.count("rollout") == 1


def test_every_event_lies_within_the_rollout_and_its_step(tiny: NativeModel):
    _, events, spans = record(small_pipeline(tiny, tiny), ["bcd", "efg"], 2, 1, ops=True)
    (rollout,) = (span for span in spans if span.name == "rollout")
    begins, ends = events["begin_ns"], events["end_ns"]
    assert (begins >= rollout.begin_ns).all() and (ends <= rollout.end_ns).all()
    assert all(rollout.begin_ns <= s.begin_ns <= s.end_ns <= rollout.end_ns for s in spans)
    assert set(events["thread"].tolist()) == {rollout.thread}
    timeline = Timeline(events, spans, [])
    steps = timeline._named("step")
    others = np.flatnonzero(~np.isin(np.arange(len(begins)), steps))
    _, within = timeline._within_steps(others)
    assert len(within) == len(others) > 0
    names = set(events["names"])
    assert {"forward", "sample", "attention", "linear qkv", "head_sample"} <= names
    _, events, _ = record(small_pipeline(tiny, tiny), ["bcd"], 1, 1, ops=False)
    assert set(events["names"]) == {
        "step", "forward", "sample",
        "prefill.rows", "prefill.drawn", "decode.rows", "decode.drawn",
    }  # fmt: skip


def test_operations_are_those_that_the_config_says(tiny_model_dir: Any):
    model = load_model(tiny_model_dir("llama"), threads=2, prefix_cache=False)
    batch, prompt, new = 3, 21, 5
    core.trace_start("ops")
    _generate(model, random_prompts(model.config["vocab_size"], batch, prompt), new)
    events = core.trace_stop()
    names = np.array(events["names"])[events["name"]]
    flops = {name: int(events["flops"][names == name].sum()) for name in events["names"]}
    facts, rows = core.describe(core.ModelFiles(str(model.path))), prompt + new - 1
    products = sum(n for name, n in flops.items() if name.startswith("linear"))
    assert products == batch * rows * 2 * facts.layer_parameters
    per_pair = 4 * model.config["num_layers"] * model.config["num_heads"] * model.config["head_dim"]
    assert flops["attention"] == batch * rows * (rows + 1) // 2 * per_pair
    assert flops["head_sample"] == batch * new * 2 * facts.head_parameters
    # Each step reads the layers' weights and the head once: this model's head is its own.
    weights = np.char.startswith(names, "linear") | (names == "head_sample")
    c = model.config
    width, kv = c["num_heads"] * c["head_dim"], c["num_kv_heads"] * c["head_dim"]
    hidden, mlp, layers = c["hidden_size"], c["intermediate_size"], c["num_layers"]
    # qkv: in and out; o: in, out and residual; gate and up; down like o.
    of_row = 4 * layers * (
        hidden + width + 2 * kv + width + 2 * hidden + hidden + 2 * mlp + mlp + 2 * hidden
    )  # fmt: skip
    rows = batch * (prompt + new - 1)
    moved = rows * of_row + batch * new * 4 * hidden
    assert events["bytes"][weights].sum() - moved == new * c["streamed_bytes"]


def test_the_engine_and_python_share_a_clock(tiny: NativeModel):
    before = time.perf_counter_ns()
    core.trace_start("steps")
    try:
        tiny.generate(["bcd"], SamplingParams(max_new_tokens=2, seed=1))
    finally:
        events = core.trace_stop()
    assert before <= events["begin_ns"].min() <= events["end_ns"].max() <= time.perf_counter_ns()


def test_too_many_events_are_counted(tiny: NativeModel):
    core.trace_start("ops", limit=10)
    tiny.generate(["bcd"], SamplingParams(max_new_tokens=2, seed=1))
    events = core.trace_stop()
    assert len(events["name"]) == 10 and events["dropped"] > 10


def test_recording_out_of_turn():
    with pytest.raises(ValueError, match='level: expected "steps" or "ops", got "all"'):
        core.trace_start("all")
    with pytest.raises(ValueError, match="trace: it is not on"):
        core.trace_stop()


def test_a_rollout_that_fails_leaves_recording_off(tiny: NativeModel):
    for _ in range(2):
        with pytest.raises(ValueError, match="prompt 1: expected text or a chat"):
            record(small_pipeline(tiny, tiny), ["bcd", " "], 1, 0, ops=True)


# --- the command ---


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


@pytest.mark.parametrize("options", [[], ["--no-ops", "--compute", "int8"]])
def test_the_command_writes_a_trace_and_the_numbers(
    tmp_path: Path, smollm2_path: Path, options: list[str]
):
    out, numbers = tmp_path / "trace.json", tmp_path / "numbers.json"
    files = ["--trace", out, "--output", numbers]
    size = ["--model", smollm2_path, "--prompts", 2, "--rewrites", 1, "--threads", 2]
    result = run(*size, *files, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text("utf-8"))
    assert [row["stage"] for row in report["stages"]] == list(STAGES)
    for row in report["stages"]:
        assert row["stage"] in result.output
        assert row["seconds"] >= 0 and (row["rows"] is None or row["rows"] > 0)
    assert report["dropped"] == 0 and report["no_reward"] is None
    assert report["steps"] > 48 and report["limits"]["fma_gflops"] > 0
    trace = json.loads(out.read_text("utf-8"))
    names = {e["name"] for e in trace["traceEvents"]}
    assert {"rollout", "hand-off", "reward", "step", *STAGES[:-1]} <= names
    if options:
        assert report["ops"] is None and "attention" not in names
        assert report["compute"] == "int8" and not report["one_engine"]
        return
    assert report["one_engine"]
    ops = {row["op"]: row for row in report["ops"]}
    assert {"linear gate_up", "attention", "head_sample", "embedding", "between ops"} <= set(ops)
    assert all(name in result.output and name in names | {"between ops"} for name in ops)
    assert 0 < ops["linear gate_up"]["fma_share"] < 1.5
    assert sum(row["share"] for row in ops.values()) < 1
    assert ops["attention"]["calls"] == 30 * report["steps"]
    assert "is there already" in refused(*size, *files)


@pytest.mark.parametrize("of_run", [False, True])
def test_a_request_in_production_by_its_phases(tmp_path: Path, tiny_model_dir: Any, of_run: bool):
    out, numbers = tmp_path / "trace.json", tmp_path / "numbers.json"
    base = tiny_model_dir("llama")
    what = ["--model", base, "--prompt", "the heron"]
    if of_run:
        run_dir = save_run(tmp_path / "my-run", base, 6)
        what = ["--run", run_dir, "--prompts", 2, "--no-ops"]
    files = ["--trace", out, "--output", numbers]
    result = run("--request", *what, "--rewrites", 2, "--threads", 1, *files)
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text("utf-8"))
    assert (report["prompt"], report["requests"]) == ((None, 4) if of_run else ("the heron", 2))
    assert sum(report["reasons"].values()) == report["requests"]
    phases = {row["phase"]: row for row in report["phases"]}
    assert list(phases) == list(PHASES)
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1)
    measured = set(phases) - {"guards", "write body"}  # where nothing is written, nor are these
    assert all(phases[name]["p50"] > 0 for name in measured)
    assert all(0 <= row["p50"] <= row["p99"] for row in phases.values())
    assert all(name in result.output for name in PHASES)
    decode = phases["prompter decode"]
    assert ("read_share" in decode) == (not of_run) and "read_share" not in phases["upstream"]
    prefill, decoding = report["steps"]
    assert prefill["steps"] == report["requests"] and decoding["steps"] > report["requests"]
    trace = json.loads(out.read_text("utf-8"))
    named = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    for name in ("request", "queue", "upstream", "read body"):
        assert named.count(name) == report["requests"]
    assert named.count("requests") == 1


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such.gguf"], "no/such.gguf"),
        (["--target", "no/such.gguf"], "no/such.gguf"),
        (["--adapter", "nothing"], "adapter_config.json"),
        (["--compute", "int4"], "compute: expected one of 'float32', 'int8'"),
        (["--prompts", "1000"], "prompts: expected at most 96, got 1000"),
        (["--trace", "no/such/folder/x.json"], "no such folder"),
        (["--trace", "x.json", "--output", "x.json"], "--trace and --output: expected two files"),
        (["--trace", "taken.json"], "taken.json: is there already"),
        (["--request", "--run", "."], "expected the directory of a run"),
        (["--request", "--target", "x"], "--target: expected only without --request"),
        (["--request", "--run", "r", "--adapter", "a"], "--adapter: expected only without --run"),
        (["--request", "--run", "r", "--model", "m"], "--model: expected only without --run"),
        (["--request", "--prompt", "x", "--prompts", "3"], "--prompts: expected only without"),
        (["--prompt", "x"], "--prompt: expected only with --request, got x"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("taken.json").write_text("mine", "utf-8")
    assert message in refused(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]
