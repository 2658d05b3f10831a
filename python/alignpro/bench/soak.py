"""`alignpro bench soak`: a proxy under clients that leave, an upstream that fails, and reloads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpro.bench.generation import Say
from alignpro.bench.load import Connection
from alignpro.bench.machine import machine, proc_bytes
from alignpro.bench.serve import chat_requests, finish, proxy_process, stand_in
from alignpro.prompter import config_of_prompter
from alignpro.serve.server import event_loop

# What the stand-in is asked to do, how often, and with which status its client's answer begins.
_KINDS = {
    "whole": (35, 200),
    "stream": (25, 200),
    "slow": (10, 200),
    "refused": (10, 429),
    "dropped": (8, 502),
    "half": (6, 200),
    "left": (6, 200),  # the client leaves before the answer has ended
}
_STREAMED = ("stream", "half", "left")
_LEAVES_WITHIN = 0.05  # seconds
# Of rewrites: most of them are written, under load as well, and soon tried again where none was.
_PATIENCE = ("deadline_seconds=2", "circuit_seconds=1")
_SAMPLE_SECONDS = 0.5
# Pages of the key-value cache are the process's once they were written on: memory rises until each
# was, by a third of SmolLM2's, for as long as it takes on this machine (12 s and more).
_STILL, _STILL_SECONDS = 0.01, 10.0  # memory stands still where it rises by less in so long
_MOST_WARM_UP = 120.0  # seconds, after which it has to
_GROWTH = 0.05  # of the memory by then, which may come on top
_SETTLE_SECONDS = 15.0  # kept connections to the upstream are closed by then


@dataclass
class _Seen:
    """What clients and watchers saw."""

    asked: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # why rewrites were used, or not
    lost: list[str] = field(default_factory=list)
    reloads: int = 0
    failed_reloads: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes
    files: list[int] = field(default_factory=list)


def bench_soak(
    *,
    run: Path | None = None,
    clients: int = 64,
    seconds: float = 60.0,
    reload_seconds: float = 5.0,
    seed: int = 0,
    threads: int,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Clients who ask a proxy as fast as they can, and whether all of them got what the upstream
    said.

    Of 100 requests the stand-in for an upstream answers 10 late, refuses 10 (429), drops 8 without
    an answer and 6 in the middle of a stream; the clients of 6 more leave before the end. All
    others must have their whole answer. With a ``run`` all are rewritten, within 2 seconds or not
    at all, and its adapter is read again every ``reload_seconds``.

    ``checks`` has by name whether it holds, and what was seen: "answers" (no request is lost),
    "reloads", "memory" (the proxy's grows by less than 5% once it stood still for 10 seconds, or
    after two minutes), "files" (as many are open at the end as before) and "requests" (none is
    under way at the end). None: there were less than 20 seconds from which to tell.

    Raises:
        RuntimeError: the proxy did not start. Of ``run`` as `Prompter.from_run`.
    """
    options = [] if run is None else ["--run", str(run), "--rewrite", "on", *_PATIENCE]
    if run is not None:
        config_of_prompter(run)  # before anything is started
    seen = _Seen()
    say("starting the proxy")
    with (
        stand_in() as upstream,
        proxy_process(
            "--upstream", f"http://127.0.0.1:{upstream}/v1", f"threads={threads}", *options
        ) as (port, pid),
        event_loop() as loop,
    ):
        say(f"{clients} clients for {seconds:g} s")
        finish(loop, _asked_once(port))  # what is opened at first use stays open
        before, begun = _open_files(pid), time.perf_counter()
        reloads = None if run is None else reload_seconds
        finish(loop, _load(seen, port, pid, clients, seconds, reloads, seed))
        took = time.perf_counter() - begun
        say("waiting for the end of all requests")
        after, under_way = finish(loop, _settled(port, pid, before))
    checks = dict(_checks(seen, before, after, under_way))
    return {
        "benchmark": "soak",
        "machine": machine(threads),
        "run": None if run is None else str(run),
        "clients": clients,
        "seconds": took,
        "seed": seed,
        "requests": dict(seen.asked),
        "requests_per_second": seen.asked.total() / took,
        "reasons": dict(seen.reasons.most_common()),
        "reloads": seen.reloads,
        "memory": seen.memory,
        "files": seen.files,
        "checks": checks,
        "holds": all(check["holds"] is not False for check in checks.values()),
    }


async def _load(
    seen: _Seen,
    port: int,
    pid: int,
    clients: int,
    seconds: float,
    reload_seconds: float | None,
    seed: int,
) -> None:
    end = time.perf_counter() + seconds
    watchers = [asyncio.create_task(_watch(seen, pid))]
    if reload_seconds is not None:
        watchers.append(asyncio.create_task(_reload(seen, port, reload_seconds)))
    await asyncio.gather(
        *(_client(seen, port, end, random.Random(f"{seed}/{n}")) for n in range(clients))
    )
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)


async def _asked_once(port: int) -> None:
    connection = await Connection.open(port)
    (request,) = chat_requests(["How do bees find their way home?"], False)
    await connection.ask(request)
    await connection.close()


async def _client(seen: _Seen, port: int, end: float, draw: random.Random) -> None:
    connection: Connection | None = None
    kinds, weights = list(_KINDS), [weight for weight, _ in _KINDS.values()]
    while time.perf_counter() < end:
        (kind,) = draw.choices(kinds, weights)
        seen.asked[kind] += 1
        question = f"{draw.random()}: how do bees find their way home?"
        (request,) = chat_requests([question], kind in _STREAMED, (b"x-stand-in", kind.encode()))
        try:
            connection = connection or await Connection.open(port)
            if kind == "left":
                connection.send(request)
                await asyncio.sleep(draw.random() * _LEAVES_WITHIN)
                connection.abort()
                connection = None
                continue
            answer = await connection.ask(request, status=_KINDS[kind][1])
            seen.reasons[answer.headers.get("x-alignpro-reason", "none")] += 1
            if kind == "half":
                seen.lost.append("half: the answer was ended, not broken off")
        except (OSError, EOFError, RuntimeError) as error:
            if kind != "half" or isinstance(error, RuntimeError):
                seen.lost.append(f"{kind}: {type(error).__name__}: {error}")
            if connection is not None:
                connection.abort()
                connection = None
    if connection is not None:
        await connection.close()


async def _reload(seen: _Seen, port: int, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        connection = await Connection.open(port)
        said = await connection.ask(
            b"POST /admin/reload HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n"
        )
        seen.reloads += 1
        if b'"reloaded"' not in said.body:
            seen.failed_reloads.append(said.body.decode(errors="replace"))
        await connection.close()


async def _watch(seen: _Seen, pid: int) -> None:
    begun = time.perf_counter()
    while True:
        held = proc_bytes(Path(f"/proc/{pid}/status"), "VmRSS")
        if held is not None:
            seen.memory.append((time.perf_counter() - begun, held))
        seen.files.append(_open_files(pid))
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _settled(port: int, pid: int, files: int) -> tuple[int, int]:
    """Open files and requests under way, once they are few again, or after a while."""
    end = time.perf_counter() + _SETTLE_SECONDS
    while True:
        connection = await Connection.open(port)
        said = await connection.ask(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        await connection.close()
        found = said.body.partition(b"\nalignpro_requests_in_progress ")[2].split(b"\n")[0]
        under_way = round(float(found))
        await asyncio.sleep(_SAMPLE_SECONDS)
        after = _open_files(pid)
        if (after <= files and not under_way) or time.perf_counter() > end:
            return after, under_way


def _open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0  # no such system


def _warm(memory: list[tuple[float, int]]) -> list[int]:
    """The memory from when it stood still first, or had to."""
    for place, (when, held) in enumerate(memory):
        before = [then for at, then in memory[:place] if at <= when - _STILL_SECONDS]
        is_still = before and held <= before[-1] * (1 + _STILL)
        if is_still or when >= _MOST_WARM_UP:
            return [then for _, then in memory[place:]]
    return []


def _checks(
    seen: _Seen, before: int, after: int, under_way: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    def check(holds: bool | None, said: str) -> dict[str, Any]:
        return {"holds": holds, "seen": said}

    kinds = Counter(lost.partition(":")[0] for lost in seen.lost)
    lost = f"; {dict(kinds)}, such as {seen.lost[0]}" if seen.lost else ""
    total = seen.asked.total()
    yield "answers", check(not seen.lost, f"{len(seen.lost)} of {total:,} requests lost{lost}")
    failed = f"; {seen.failed_reloads[0]}" if seen.failed_reloads else ""
    if seen.reloads:
        said = f"{len(seen.failed_reloads)} of {seen.reloads} failed{failed}"
        yield "reloads", check(not seen.failed_reloads, said)
    # The highest of a third each: what is held swings with what is under way.
    late = _warm(seen.memory)
    if len(late) * _SAMPLE_SECONDS >= 2 * _STILL_SECONDS:
        then, now = (max(part) for part in (late[: len(late) // 3], late[-len(late) // 3 :]))
        said = f"{then / 2**20:.0f} MiB, then {now / 2**20:.0f} MiB"
        yield "memory", check(now <= then * (1 + _GROWTH), said)
    elif seen.memory:
        first, last = seen.memory[0][1] / 2**20, seen.memory[-1][1] / 2**20
        said = f"{first:.0f} MiB, then {last:.0f} MiB: too short to tell; --minutes asks for more"
        yield "memory", check(None, said)
    most = max(seen.files, default=0)
    yield "files", check(after <= before, f"{before} open before, {most} at most, {after} after")
    yield "requests", check(under_way == 0, f"{under_way} under way at the end")
