"""`alignpro bench serve`: what a proxy adds to a request, and how many rewrites it makes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignpro.bench.generation import Say, rollout_prompts
from alignpro.bench.load import Timed, closed_loop, paced
from alignpro.bench.machine import machine, percentiles
from alignpro.interrupts import interrupts_deferred
from alignpro.prompter import config_of_prompter
from alignpro.serve.server import event_loop
from alignpro.types import Conversation

REWRITE_CLIENTS = (1, 16)
_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "aiohttp")
_SHARE = 0.25  # of what the proxy takes, where no rate is given
_PROMPTS = 96  # all of the everyday set for training
_DEADLINE = 60.0  # seconds: no rewrite is cut off, so that all are measured
_WRITTEN = ("rewritten", "unchanged", "empty", "several_texts")  # and what a guard refused
_QUESTION = "How do bees find their way home, and what do they do when clouds hide the sun?"
Result = TypeVar("Result")


def bench_serve(
    *,
    clients: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    rate: float | None = None,
    run: Path | None = None,
    rewrites: int = 64,
    repeats: int = 5,
    threads: int,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Times of chat requests to a stand-in for an upstream, alone and through `alignpro serve`.

    The stand-in, the proxy and the clients (this one) are processes of their own on this machine.
    Requests are not rewritten, and paced: ``rate`` a second, or a quarter of what the clients get
    out of the proxy when they ask as fast as they can, which is measured before. A round lasts
    ``seconds``. ``busy`` is the share of all processors' time that was used meanwhile, other
    processes' included: near 1 the figures are those of a queue. Percentiles are of all rounds'
    ``requests``, the ways taking turns; ``added`` is the difference of those. Of a "stream" it is
    the time to the first byte of the body, of a "whole" answer to its last.

    With a ``run`` whose prompter rewrites, `REWRITE_CLIENTS` ask as fast as they can: requests a
    second (median of the rounds) of which a rewrite was written, and the rewrite's own time as the
    proxy says it. No two prompts are alike.

    Raises:
        RuntimeError: the proxy did not start, or answered with another status than 200; no rewrite
            was written. Of ``run`` as `Prompter.from_run`.
    """
    if run is not None:
        config_of_prompter(run)  # before anything is measured
    report: dict[str, Any] = {
        "benchmark": "serve",
        "machine": machine(threads, _PACKAGES),
        "repeats": repeats,
        "seconds": seconds,
        "results": [],
        "rewritten": None,
    }
    with stand_in() as upstream:
        address = f"http://127.0.0.1:{upstream}/v1"
        say("starting the proxy")
        with proxy_process("--upstream", address) as (port, _):
            ways = {"alone": upstream, "serve": port}
            for kind in ("whole", "stream"):
                for count in clients:

                    def of_row(what: str, row: str = f"{kind} answers, {count} clients") -> None:
                        say(f"{row}, {what}")

                    row = _added(ways, kind == "stream", count, seconds, rate, repeats, of_row)
                    report["results"].append({"answer": kind, "clients": count, **row})
        if run is not None:
            say("loading the run")
            options = ("rewrite=on", f"deadline_seconds={_DEADLINE}", f"threads={threads}")
            with proxy_process(*options, "--upstream", address, "--run", str(run)) as (port, _):
                report["rewritten"] = {"run": str(run), **_rewritten(port, rewrites, repeats, say)}
    return report


def _added(
    ways: dict[str, int],
    stream: bool,
    clients: int,
    seconds: float,
    rate: float | None,
    repeats: int,
    say: Say,
) -> dict[str, Any]:
    """One row: both ways at one rate."""
    (asked,) = chat_requests([_QUESTION], stream)
    fastest = 0.0
    say("warming up")
    for port in ways.values():  # the last one counts; both are warm then
        begun = time.perf_counter()
        answered = len(_run(closed_loop(port, _until(begun + seconds, asked), clients)))
        fastest = answered / (time.perf_counter() - begun)
    rate = rate or _SHARE * fastest
    round_ = [asked] * max(round(rate * seconds), 1)
    times: dict[str, list[float]] = {name: [] for name in ways}
    used, all_time = _processor_time()
    for seed in range(repeats):
        say(f"round {seed + 1} of {repeats}")
        for name, port in ways.items():
            answers = _run(paced(port, round_, clients, rate, seed))
            times[name] += [one.first_byte for one in answers]
    now_used, now_all = _processor_time()
    found = {name: percentiles(values) for name, values in times.items()}
    added = {key: found["serve"][key] - found["alone"][key] for key in found["alone"]}
    busy = (now_used - used) / (now_all - all_time) if now_all > all_time else None
    row = {"rate": rate, "closed_loop_rate": fastest, "requests": repeats * len(round_)}
    return {**row, "busy": busy, **found, "added": added}


def _until(end: float, request: bytes) -> Iterator[bytes]:
    while time.perf_counter() < end:
        yield request


def _rewritten(port: int, count: int, repeats: int, say: Say) -> dict[str, Any]:
    """Rewritten requests by the number of clients; the first round warms up."""
    questions = [Conversation.of(prompt).last_turn for prompt in rollout_prompts(_PROMPTS)]
    number = 0
    rounds: dict[int, list[tuple[float, list[Timed]]]] = {n: [] for n in REWRITE_CLIENTS}
    for _ in range(repeats + 1):
        for clients in REWRITE_CLIENTS:
            say(f"rewritten, {clients} clients")
            texts = [f"{n}. {questions[n % len(questions)]}" for n in range(number, number + count)]
            number += count
            begun = time.perf_counter()
            answers = _run(closed_loop(port, chat_requests(texts, False), clients))
            rounds[clients].append((time.perf_counter() - begun, answers))
    results: list[dict[str, Any]] = []
    for clients, (_, *measured) in rounds.items():
        answers = [one for _, some in measured for one in some if _is_written(one)]
        if not answers:
            raise RuntimeError(f"no rewrite was written: {_reasons(measured[0][1])}")
        rates = [sum(map(_is_written, some)) / took for took, some in measured]
        said = [float(one.headers["x-alignpro-rewrite-ms"]) / 1e3 for one in answers]
        results.append(
            {
                "clients": clients,
                "requests_per_second": statistics.median(rates),
                "all_requests_per_second": rates,
                "rewrite": percentiles(said),
                "reasons": _reasons([one for _, some in measured for one in some]),
            }
        )
    one, many = (row["requests_per_second"] for row in results)
    return {"requests": count, "results": results, "speedup": many / one}


def _is_written(answer: Timed) -> bool:
    reason = answer.headers["x-alignpro-reason"]
    return reason in _WRITTEN or reason.startswith("guard_")


def _reasons(answers: Sequence[Timed]) -> dict[str, int]:
    return dict(Counter(one.headers["x-alignpro-reason"] for one in answers).most_common())


def chat_requests(
    questions: Sequence[str], stream: bool, *headers: tuple[bytes, bytes]
) -> list[bytes]:
    """Chats with these last turns, as bytes on the wire."""
    found = []
    more = b"".join(b"%s: %s\r\n" % header for header in headers)
    for question in questions:
        body = chat_body(question, stream)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"authorization: Bearer none\r\ncontent-type: application/json\r\n"
        )
        found.append(head + more + b"content-length: %d\r\n\r\n" % len(body) + body)
    return found


def chat_body(question: str, stream: bool) -> bytes:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]
    chat = {"model": "stand-in", "messages": messages, "temperature": 0.7, "stream": stream}
    return json.dumps(chat).encode()


def _processor_time() -> tuple[int, int]:
    """(used, all) of the machine since it began, in ticks; zeros where the kernel does not say."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle and waiting for disks


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    with event_loop() as loop:
        return finish(loop, work)


def finish(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of it. An interrupt cancels it, and is raised behind it: out of the middle of an
    event loop uvloop lets it with a traceback, or not at all."""
    task = loop.create_task(work)

    def cancel() -> None:
        loop.call_soon_threadsafe(task.cancel)

    with interrupts_deferred(tell=cancel) as raise_if_arrived:
        try:
            return loop.run_until_complete(task)
        except BaseException:
            raise_if_arrived()
            raise


@contextlib.contextmanager
def stand_in() -> Iterator[int]:
    """The port of `stand_in`."""
    with _process("-m", "alignpro.bench.stand_in") as (line, _):
        yield int(line)


@contextlib.contextmanager
def proxy_process(*arguments: str) -> Iterator[tuple[int, int]]:
    """The port of an `alignpro serve`, and its process."""
    with _process("-m", "alignpro", "serve", *arguments, "--port", "0") as (line, pid):
        yield int(line.rpartition(":")[2].removesuffix("/v1")), pid


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[tuple[str, int]]:
    """The first line that a Python process prints, and its number; it is ended with the block.

    Raises RuntimeError: it ended without one, with what it said instead.
    """
    command = [sys.executable, *arguments]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                process.wait()
                errors.seek(0)
                raise RuntimeError(errors.read().strip() or f"{arguments[1]} ended at once")
            yield line, process.pid
        finally:
            process.terminate()
