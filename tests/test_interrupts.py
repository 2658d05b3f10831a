"""Signals that ask a process to end: raised where nothing is torn, in the process they are for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from alignpro.interrupts import exit_status, interruptible, interrupts_deferred


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_a_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        with interrupts_deferred() as raise_if_arrived:
            raise_if_arrived()
            os.kill(os.getpid(), number)
            done.append("the block")
        done.append("what comes after it")
    assert done == ["the block"] and exit_status(caught.value) == 128 + number
    with interruptible(), interrupts_deferred(after=OSError("disk full")):
        os.kill(os.getpid(), number)  # the run ends anyway


class Dropped:
    """A signal arrives while this is taken down, where Python lets no exception out."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_arrives_in_a_destructor_is_raised_behind_it(number):
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        Dropped(number)
        for _ in range(100):
            time.sleep(0.05)
    assert exit_status(caught.value) == 128 + number
    assert sys.unraisablehook is hook


def test_another_error_in_a_destructor_is_said_as_before(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: said.append(args.exc_type))
    with interruptible():
        Dropped("no number")
    assert said == [TypeError]


def test_what_is_ignored_or_handled_stays_so():
    seen = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_forked_worker_is_ended_by_its_signal():
    with interruptible(), interrupts_deferred():
        ready, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(say, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_another_thread_changes_nothing():
    def work():
        with interruptible(), interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
