"""Spans of Python work, for `alignpro profile`; the engine records its own.

Off, which is how a process starts, a span is one look at a global. Standard library only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Work with a name, on the clock of ``time.perf_counter_ns``."""

    name: str
    begin_ns: int
    end_ns: int
    thread: int  # threading.get_native_id


def span(name: str) -> AbstractContextManager[None]:
    """Records the block under ``name`` where recording is on, also where it raises."""
    to = _spans  # another thread may stop the recording meanwhile
    return _OFF if to is None else _record(name, to)


def add(name: str, begin_ns: int) -> None:
    """Records what began then, in whichever thread, and ends now in this one."""
    to = _spans
    if to is not None:
        to.append(Span(name, begin_ns, time.perf_counter_ns(), threading.get_native_id()))


def start() -> None:
    """Record from now on, for all threads. Raises RuntimeError where it is on already."""
    global _spans
    if _spans is not None:
        raise RuntimeError("trace: it is on already; stop() it first")
    _spans = []


def stop() -> list[Span]:
    """What was recorded, in the order in which it ended. Raises RuntimeError where it is off."""
    global _spans
    if _spans is None:
        raise RuntimeError("trace: it is not on; start() it first")
    recorded, _spans = _spans, None
    return recorded


_OFF: AbstractContextManager[None] = contextlib.nullcontext()
_spans: list[Span] | None = None


@contextlib.contextmanager
def _record(name: str, to: list[Span]) -> Iterator[None]:
    begin = time.perf_counter_ns()
    try:
        yield
    finally:
        to.append(Span(name, begin, time.perf_counter_ns(), threading.get_native_id()))
