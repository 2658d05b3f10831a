"""Ctrl-C and the signals that ask a process to end: one exception, where nothing is torn."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# SIGTERM: kill, batch systems, containers. SIGHUP: the terminal is gone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BEHIND = 0.01  # seconds, in which what raises nothing is over


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end, and which one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """As shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + int(getattr(interrupt, "number", signal.SIGINT))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP interrupt as Ctrl-C does.

    One that is ignored (nohup) or that somebody handles stays so. Signals reach the main thread
    only; in others the block changes nothing. One that arrives in a destructor, out of which Python
    lets no exception, is raised behind it.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _raised_again(), _handled(interrupt, lambda handler: handler == signal.SIG_DFL):
        yield


@contextlib.contextmanager
def _raised_again() -> Iterator[None]:
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            before(lost)
            return
        number = exit_status(lost.exc_value) - 128
        again = threading.Timer(_BEHIND, _thread.interrupt_main, (number,))
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def interrupts_deferred(
    *, after: BaseException | None = None, tell: Callable[[], object] | None = None
) -> Iterator[Callable[[], None]]:
    """Hold interrupts back until the block is done: what it changes is changed as a whole.

    Yields a function that raises one at once: for the places in between where nothing is torn.
    after: the error that ends the run, if one does; what arrives then adds nothing to it.
    tell: is called when one arrives, such as to end the block.
    """
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)
        if tell is not None:
            tell()

    def raise_if_arrived() -> None:
        if arrived:
            raise Interrupted(arrived[0])

    with _handled(note, lambda handler: handler not in (signal.SIG_DFL, signal.SIG_IGN, None)):
        yield raise_if_arrived
    if after is None:
        raise_if_arrived()


@contextlib.contextmanager
def _handled(
    handle: Callable[[int, FrameType | None], object], which: Callable[[object], bool]
) -> Iterator[None]:
    """``handle`` in the place of those handlers that ``which`` picks; in this process alone, since
    a worker that a reward forks is ended by them."""
    before, home = {}, os.getpid()

    def handle_here(number: int, frame: FrameType | None) -> None:
        if os.getpid() == home:
            handle(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if which(handler):
                before[number] = handler
                signal.signal(number, handle_here)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
