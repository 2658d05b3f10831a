"""`alignpro profile --request`: where the time of one request in production goes, by phase."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import trace
from alignpro.bench.generation import Say, rollout_prompts
from alignpro.bench.machine import limits, machine, percentiles
from alignpro.bench.profile import record_work
from alignpro.bench.serve import chat_body, finish, stand_in
from alignpro.bench.timeline import ROW_STAGES, Timeline
from alignpro.bench.work import ROLLOUT
from alignpro.config import GuardConfig
from alignpro.config.serve import ServeConfig
from alignpro.prompter import Prompter
from alignpro.serve.app import Proxy
from alignpro.serve.build import upstream_of
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.routes import Route, Routes
from alignpro.serve.server import event_loop
from alignpro.types import Conversation

# In the order of a request. "queue" is from the request's hand-over to the engine's thread until
# that takes it; "upstream" until there is a status; "other" is what no span is around: changes of
# threads, headers, counters.
PHASES = (
    *("receive", "read body", "route", "template", "tokens", "queue", *ROW_STAGES[:2]),
    *("guards", "write body", "upstream", "relay", "other"),
)
_LIMIT_REPEATS = 5
_WARM_UP = 3  # requests before those that are recorded
_DEADLINE = 60.0  # seconds: no rewrite is cut off, so that all are measured


def profile_request(
    *,
    model: Path | None = None,
    run: Path | None = None,
    adapter: Path | None = None,
    prompt: str | None = None,
    prompts: int = ROLLOUT.prompts,
    rewrites: int = ROLLOUT.rewrites,
    ops: bool = True,
    out: Path,
    threads: int,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Record requests to the proxy of `alignpro serve`, one after another, each rewritten and then
    sent to a stand-in for an upstream (`stand_in`, on this machine); write their trace to ``out``.

    A request is all that the proxy does for it, from its headers to the end of its answer, without
    the sockets of its client. Percentiles of a phase are over requests, a phase's share is of the
    time of all. Those of the engine are compared with the limits of the machine.

    Args:
        run: whose prompter rewrites, in place of ``model`` with ``adapter``, a PEFT folder.
        prompt: the user turn of all requests, whose prefill is then what the prefix cache leaves of
            it; None asks ``prompts`` of the everyday set, numbered so that no two are alike.
        rewrites: requests of each prompt.
        ops: record every op of the engine as well, which shares of limits are counted from.

    Raises as `Prompter.from_run` and `Prompter`.
    """
    if prompt is None:
        asked = [Conversation.of(p).last_turn for p in rollout_prompts(prompts)] * rewrites
        turns = [f"{number}. {turn}" for number, turn in enumerate(asked)]
    else:
        turns = [prompt] * rewrites
    say("loading")
    guards = GuardConfig()
    if run is not None:
        prompter = Prompter.from_run(run, threads=threads, guards=guards)
    else:
        assert model is not None
        prompter = Prompter(model, adapter, guards=guards, threads=threads)
    say("measuring the machine's limits")
    measured = limits(threads, _LIMIT_REPEATS)
    say("requests")
    bodies = [chat_body(turn, False) for turn in turns]
    with stand_in() as port, prompter:
        reasons, events, spans = _record(prompter, port, bodies, ops)
    whole = _timeline(events, spans, "requests")
    alone = [s for s in spans if s.name != "request"]
    each = [_timeline(events, [*alone, s], "request") for s in spans if s.name == "request"]
    seconds = [one.seconds for one in each]
    report = {
        "benchmark": "request",
        "machine": machine(threads),
        "limits": measured,
        "repeats": _LIMIT_REPEATS,
        "model": prompter.model.name,
        "run": None if run is None else str(run),
        "adapter": None if adapter is None else str(adapter),
        "prompt": prompt,
        "requests": len(each),
        "reasons": reasons,
        "request": percentiles(seconds),
        "steps_per_request": whole.steps / len(each),
        "phases": list(_phases(whole, each, measured if ops else None)),
        "steps": [_step(whole, stage) for stage in ROW_STAGES[:2]],
        "dropped": events["dropped"],
        "trace": str(out),
    }
    say("writing")
    whole.write_chrome_trace(out, {k: v for k, v in report.items() if k != "phases"})
    return report


def _timeline(events: Mapping[str, Any], spans: Sequence[trace.Span], root: str) -> Timeline:
    # All of the engine's rows are a prompter's here.
    return Timeline(events, spans, np.unique(events["key"]).tolist(), root=root, stages=PHASES)


def _record(
    prompter: Prompter, port: int, bodies: Sequence[bytes], ops: bool
) -> tuple[dict[str, int], Mapping[str, Any], list[trace.Span]]:
    """What became of the rewrites, and what was recorded meanwhile."""
    config = ServeConfig(upstream=f"http://127.0.0.1:{port}/v1", deadline_seconds=_DEADLINE)
    routes = Routes(Route("on", [Rewriter("profile", prompter, config)]))
    proxy = Proxy(config, upstream_of(config), routes)

    async def ask(asked: Sequence[bytes]) -> list[str]:
        return [await _answered(proxy, body) for body in asked]

    def spanned() -> list[str]:
        with trace.span("requests"):
            return finish(loop, ask(bodies))

    with event_loop() as loop:
        finish(loop, ask(bodies[:_WARM_UP]))
        reasons, events, spans = record_work(spanned, ops=ops)
        finish(loop, proxy.close())
    return dict(Counter(reasons).most_common()), events, spans


async def _answered(proxy: Proxy, body: bytes) -> str:
    """Ask the proxy as a server does; what became of the rewrite.

    Raises RuntimeError: another status than 200.
    """
    path = "/v1/chat/completions"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    said: dict[bytes, bytes] = {}

    async def receive() -> dict[str, Any]:
        if not parts:  # the client stays
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if message["status"] != 200:
                raise RuntimeError(f"expected status 200, got {message['status']}")
            said.update(message["headers"])

    await proxy({**scope, "query_string": b"", "headers": headers}, receive, send)
    return said[b"x-alignpro-reason"].decode()


def _phases(
    whole: Timeline, each: Sequence[Timeline], measured: Mapping[str, float] | None
) -> Iterator[dict[str, Any]]:
    total = sum(one.seconds for one in each)
    found = [{row["stage"]: row["seconds"] for row in one.stages()} for one in each]
    work = whole.work()
    for phase in PHASES:
        seconds = [one[phase] for one in found]
        row: dict[str, Any] = {"phase": phase, **percentiles(seconds)}
        row["share"] = sum(seconds) / total
        if phase in ROW_STAGES and measured is not None and sum(seconds):
            flops, moved = (counted / sum(seconds) / 1e9 for counted in work[phase])
            row |= {"gflops": flops, "fma_share": flops / measured["fma_gflops"]}
            row |= {"gbps": moved, "read_share": moved / measured["read_gbps"]}
        yield row


def _step(whole: Timeline, stage: str) -> dict[str, Any]:
    seconds = whole.seconds_of_steps(stage).tolist()
    return {"stage": stage, "steps": len(seconds), **(percentiles(seconds) if seconds else {})}
