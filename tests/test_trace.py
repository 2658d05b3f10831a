"""Spans of Python work: recorded where it is on, nothing where it is off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from alignpro import trace


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    if trace._spans is not None:
        trace.stop()


def test_spans_nest_on_the_clock_of_perf_counter():
    before = time.perf_counter_ns()
    trace.start()
    with trace.span("outer"), trace.span("inner"):
        pass
    inner, outer = trace.stop()
    assert (inner.name, outer.name) == ("inner", "outer")
    after = time.perf_counter_ns()
    times = [before, outer.begin_ns, inner.begin_ns, inner.end_ns, outer.end_ns, after]
    assert times == sorted(times)
    assert inner.thread == outer.thread == threading.get_native_id()


def test_off_makes_nothing():
    assert trace.span("one") is trace.span("two")
    with trace.span("three"):
        pass
    trace.start()
    assert trace.stop() == []


def test_a_span_is_recorded_where_its_block_raises():
    trace.start()
    with pytest.raises(KeyError), trace.span("broken"):
        raise KeyError("x")
    assert [span.name for span in trace.stop()] == ["broken"]


def test_a_span_that_outlives_its_recording_is_in_no_other():
    trace.start()
    with trace.span("across"):
        assert trace.stop() == []
        trace.start()
    assert trace.stop() == []


def test_what_began_in_another_thread_ends_here():
    begun = time.perf_counter_ns()
    trace.add("off", begun)
    trace.start()
    trace.add("queue", begun)
    (span,) = trace.stop()
    assert (span.name, span.begin_ns) == ("queue", begun) and span.end_ns > begun
    assert span.thread == threading.get_native_id()


def test_threads_record_side_by_side():
    def work() -> None:
        with trace.span("work"):
            time.sleep(0.01)

    trace.start()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({span.thread for span in trace.stop()}) == 4


def test_out_of_turn():
    with pytest.raises(RuntimeError, match="trace: it is not on"):
        trace.stop()
    trace.start()
    with pytest.raises(RuntimeError, match="trace: it is on already"):
        trace.start()
