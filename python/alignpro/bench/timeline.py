"""What recorded work spent its time on: stages, ops, and a trace that Perfetto opens."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpro.files import whole_file
from alignpro.statistics import Floats
from alignpro.trace import Span

# Of the rows of an engine's step; what a step is made of is marked under these names.
ROW_STAGES = ("prompter prefill", "prompter decode", "target prefill", "target decode")
_ROWS = ("prefill.rows", "decode.rows")
_DRAWN = ("prefill.drawn", "decode.drawn")
_COLUMNS = ("name", "begin_ns", "end_ns", "thread", "rows", "key", "flops", "bytes")
_STEP_PARTS = ("step", "forward", "sample")
STAGES = (*ROW_STAGES[:2], "hand-off", *ROW_STAGES[2:], "reward", "other")  # of a rollout


class Timeline:
    """One recorded rollout, or other work with a span around all of it.

    A step of an engine may hold rows of both models, in prefill and in decoding. Its time is
    divided among them: that of drawing tokens by the rows that drew one, all other time of the
    step by rows. A row is the prompter's if its request bears one of ``rewrite_seeds``, the
    rollout's own (`alignpro.pipeline.derive_seed`), and the target's otherwise. Hand-off and reward
    are what the pipeline recorded under these names; "other" is what is left of the rollout:
    reading the prompts, and what is done with finished answers. What is outside the root's span
    counts for nothing.

    Args:
        events: as `_core.trace_stop` returns it.
        spans: as `alignpro.trace.stop` returns it, with one of the name ``root``.
        stages: in the order of reading: some of `ROW_STAGES`, names of spans that overlap neither
            each other nor steps, and "other" at the end.
    """

    def __init__(
        self,
        events: Mapping[str, Any],
        spans: Sequence[Span],
        rewrite_seeds: Collection[int],
        *,
        root: str = "rollout",
        stages: Sequence[str] = STAGES,
    ) -> None:
        (self.root,) = (span for span in spans if span.name == root)
        self._stages = stages
        self._spans = [span for span in spans if self._holds(span.begin_ns, span.end_ns)]
        inside = self._holds(events["begin_ns"], events["end_ns"])
        rows = {name: column[inside] for name, column in events.items() if name in _COLUMNS}
        self._events = {**events, **rows}
        events = self._events
        self.seconds = (self.root.end_ns - self.root.begin_ns) / 1e9
        steps = self._named("step")
        steps = steps[np.argsort(events["begin_ns"][steps], kind="stable")]
        self._steps = steps
        self._step_seconds = self._durations(steps)
        seeds = np.array(list(rewrite_seeds), np.uint64)
        self.rows = self._by_stage(_ROWS, seeds)
        self.drawn = self._by_stage(_DRAWN, seeds)
        sampling = np.zeros(len(steps))
        at, samples = self._within_steps(self._named("sample"))
        np.add.at(sampling, at, self._durations(samples))
        rest = self._step_seconds - sampling
        self.step_stages = _shares(self.rows) * rest[:, None]
        self.step_stages += _shares(self.drawn) * sampling[:, None]

    @property
    def steps(self) -> int:
        """Forward passes."""
        return int((self.rows.sum(1) > 0).sum())

    def stages(self) -> list[dict[str, Any]]:
        """Seconds by stage, in the order of `STAGES`; they add up to the rollout's. Rows of a
        stage that has some are the positions computed for it."""
        seconds = dict(zip(ROW_STAGES, self.step_stages.sum(0).tolist(), strict=True))
        for stage in self._stages[:-1]:
            if stage not in ROW_STAGES:
                seconds[stage] = sum(
                    (s.end_ns - s.begin_ns) / 1e9 for s in self._spans if s.name == stage
                )
        seconds["other"] = self.seconds - sum(seconds.values())
        rows = dict(zip(ROW_STAGES, self.rows.sum(0).astype(int).tolist(), strict=True))
        return [
            {
                "stage": stage,
                "seconds": seconds[stage],
                "share": seconds[stage] / self.seconds,
                "rows": rows.get(stage),
            }
            for stage in self._stages
        ]

    def seconds_of_steps(self, stage: str) -> Floats:
        """Of every step with rows of this one of `ROW_STAGES`, the seconds that they took."""
        column = ROW_STAGES.index(stage)
        seconds: Floats = self.step_stages[self.rows[:, column] > 0, column]
        return seconds

    def work(self) -> dict[str, tuple[float, float]]:
        """(operations, bytes) of each of `ROW_STAGES`: those of a step divided as its rows are;
        zeros where ops were not recorded."""
        at, events = self._within_steps(np.arange(len(self._events["name"])))
        counted = np.zeros((len(self._steps), 2))
        for column, name in enumerate(("flops", "bytes")):
            np.add.at(counted[:, column], at, self._events[name][events])
        flops, moved = (_shares(self.rows).T @ counted).T.tolist()
        return dict(zip(ROW_STAGES, zip(flops, moved, strict=True), strict=True))

    def ops(self, limits: Mapping[str, float]) -> list[dict[str, Any]]:
        """Calls, seconds, operations and bytes by op, most time first, and how that compares with
        ``limits`` (`machine.limits`). "between ops" is the rest of the engine's forward passes."""
        events = self._events
        found = []
        for index, name in enumerate(events["names"]):
            if name in (*_STEP_PARTS, *_ROWS, *_DRAWN):
                continue
            of = np.flatnonzero(events["name"] == index)
            seconds = float(self._durations(of).sum())
            flops, moved = int(events["flops"][of].sum()), int(events["bytes"][of].sum())
            gflops, gbps = flops / seconds / 1e9, moved / seconds / 1e9
            found.append(
                {
                    "op": name,
                    "calls": len(of),
                    "seconds": seconds,
                    "share": seconds / self.seconds,
                    "flops": flops,
                    "bytes": moved,
                    "gflops": gflops,
                    "fma_share": gflops / limits["fma_gflops"],
                    "gbps": gbps,
                    "read_share": gbps / limits["read_gbps"],
                }
            )
        if not found:
            return []
        passes = sum(float(self._durations(self._named(n)).sum()) for n in ("forward", "sample"))
        between = passes - sum(op["seconds"] for op in found)
        found.append({"op": "between ops", "seconds": between, "share": between / self.seconds})
        return sorted(found, key=lambda op: -op["seconds"])

    def write_chrome_trace(self, path: Path, about: Mapping[str, Any]) -> None:
        """The trace event format, complete events in microseconds from the root's begin:
        process 1 is what ran on each thread, process 2 which stages each step worked for."""
        if path.exists():
            raise FileExistsError(f"{path}: is there already; name another file")
        with whole_file(path) as file:
            head = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n'
            file.write(head.encode())
            for number, event in enumerate(self._chrome_events()):
                line = json.dumps(event, separators=(",", ":"))
                file.write((f",\n{line}" if number else line).encode())
            file.write(b"\n]}\n")

    def _chrome_events(self) -> Iterator[dict[str, Any]]:
        for process, name in ((1, "alignpro"), (2, "stages")):
            yield _about("process_name", process, name=name)
            yield _about("process_sort_index", process, sort_index=process)
        main = threading.main_thread().native_id
        threads = {s.thread for s in self._spans} | set(self._events["thread"].tolist())
        for thread in sorted(threads, key=lambda t: (t != main, t)):
            name = "main" if thread == main else f"thread {thread}"
            yield _about("thread_name", 1, tid=thread, name=name)
        tracks = {stage: number for number, stage in enumerate(self._stages[:-1], start=1)}
        for stage, number in tracks.items():
            yield _about("thread_name", 2, tid=number, name=stage)
        for span in self._spans:
            yield self._complete(1, span.thread, span.name, span.begin_ns, span.end_ns, {})
            if span.name in tracks:
                track = tracks[span.name]
                yield self._complete(2, track, span.name, span.begin_ns, span.end_ns, {})
        yield from self._chrome_steps(tracks)

        events = self._events
        marks_and_steps = {"step", *_ROWS, *_DRAWN}
        counts = ("rows", "flops", "bytes")
        columns = ("name", "thread", "begin_ns", "end_ns", *counts)
        for event in zip(*(events[column].tolist() for column in columns), strict=True):
            name, thread, begin, end = events["names"][event[0]], *event[1:4]
            if name not in marks_and_steps:
                args = {k: v for k, v in zip(counts, event[4:], strict=True) if v}
                yield self._complete(1, thread, name, begin, end, args)

    def _chrome_steps(self, tracks: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        columns = (self._events[c][self._steps].tolist() for c in ("thread", "begin_ns", "end_ns"))
        for number, (thread, begin, end) in enumerate(zip(*columns, strict=True)):
            rows = {s: int(n) for s, n in zip(ROW_STAGES, self.rows[number], strict=True) if n}
            yield self._complete(1, thread, "step", begin, end, {**rows})
            for stage, count in rows.items():
                seconds = self.step_stages[number, ROW_STAGES.index(stage)]
                args = {"rows": count, "us": round(seconds * 1e6, 3)}
                yield self._complete(2, tracks[stage], stage, begin, end, args)

    def _complete(
        self, process: int, thread: int, name: str, begin: int, end: int, args: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": process,
            "tid": thread,
            "name": name,
            "ts": (begin - self.root.begin_ns) / 1000,
            "dur": (end - begin) / 1000,
            "args": args,
        }

    def _holds(self, begin: Any, end: Any) -> Any:
        """Whether the root's span holds what has these times: numbers, or arrays of them."""
        return (begin >= self.root.begin_ns) & (end <= self.root.end_ns)

    def _named(self, name: str) -> NDArray[np.int64]:
        names = self._events["names"]
        index = names.index(name) if name in names else -1
        return np.flatnonzero(self._events["name"] == index)

    def _durations(self, events: NDArray[np.int64]) -> Floats:
        nanoseconds: Floats = self._events["end_ns"][events] - self._events["begin_ns"][events]
        return nanoseconds / 1e9

    def _within_steps(
        self, events: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(step, event) for every event that lies in a step: one engine steps at a time."""
        begins = self._events["begin_ns"][self._steps]
        at = np.searchsorted(begins, self._events["begin_ns"][events], side="right") - 1
        ends = self._events["end_ns"][self._steps]
        inside = at >= 0
        inside[inside] = self._events["end_ns"][events][inside] <= ends[at[inside]]
        return at[inside], events[inside]

    def _by_stage(self, marks: tuple[str, str], rewrite_seeds: NDArray[np.uint64]) -> Floats:
        """[steps, ROW_STAGES] rows so marked."""
        total = np.zeros((len(self._steps), len(ROW_STAGES)))
        for phase, mark in enumerate(marks):
            at, events = self._within_steps(self._named(mark))
            of_target = ~np.isin(self._events["key"][events], rewrite_seeds)
            stage = 2 * of_target.astype(np.int64) + phase
            np.add.at(total, (at, stage), self._events["rows"][events])
        return total


def engine_flops(events: Mapping[str, Any], since_ns: int = 0) -> int | None:
    """Operations of the engine's steps from a moment on, by count; None where some did not fit."""
    if events["dropped"] or "step" not in events["names"]:
        return None
    steps = np.flatnonzero(events["name"] == events["names"].index("step"))
    steps = steps[np.argsort(events["begin_ns"][steps])]
    begins = events["begin_ns"]
    at = np.searchsorted(begins[steps], begins, side="right") - 1
    inside = (at >= 0) & (begins >= since_ns) & (begins <= events["end_ns"][steps][at])
    return int(events["flops"][inside].sum())


def beyond(op: Mapping[str, Any]) -> bool:
    """Whether an op is above a limit of the machine: bytes that come from the caches are faster
    than memory, and limits are measured while other work may hold the machine back."""
    return bool(max(op.get("fma_share", 0.0), op.get("read_share", 0.0)) > 1)


def _shares(rows: Floats) -> Floats:
    """Each step's rows as parts of 1; zeros where there are none."""
    total: Floats = np.maximum(rows.sum(1, keepdims=True), 1)
    return rows / total


def _about(what: str, process: int, tid: int | None = None, **args: Any) -> dict[str, Any]:
    event = {"ph": "M", "pid": process, "name": what, "args": args}
    return event if tid is None else event | {"tid": tid}
