"""A model's requests from many threads and event loops, stepped by one thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import enum
import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from alignpro import trace
from alignpro.models.completion_text import TextStream
from alignpro.models.mixture import check_streams
from alignpro.models.native_client import NativeClient, NativeHandle, prompt_end
from alignpro.models.native_model import NativeModel
from alignpro.types import Completion, SamplingParams


class ClosedError(RuntimeError):
    """It was closed, and takes no requests."""


@dataclass(eq=False)
class _Request:
    tokens: list[int]
    params: SamplingParams
    adapter: Any
    sample: int
    on_step: Callable[[NativeHandle], None] | None
    future: Future[Completion] = field(default_factory=Future)
    handle: NativeHandle | None = None
    queued_ns: int = field(default_factory=time.perf_counter_ns)

    def cancel(self, future: Future[Completion]) -> None:
        """In whichever thread cancels; one that is not submitted yet never is."""
        if future.cancelled() and self.handle is not None:
            self.handle.cancel()

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
            self.future.set_exception(error)


class _End(enum.Enum):
    CLOSED = enum.auto()
    AT_EXIT = enum.auto()


_Inbox = queue.SimpleQueue[_Request | _End]


class EngineThread:
    """Requests of any thread join the batch that is under way, and fail alone.

    A request is prepared (tokens, adapter) by who submits it, so that this thread only steps. It
    ends with `close`, with the object, or with the interpreter.
    """

    def __init__(self, model: NativeModel) -> None:
        self._inbox: _Inbox = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is put behind what ends it
        self._closed = False
        self._tokenizer = model.tokenizer
        self._process = os.getpid()
        # The thread does not know this object, which may so be dropped.
        thread = threading.Thread(
            target=_drive, args=(model.client(), self._inbox), daemon=True, name="engine"
        )
        thread.start()
        at_exit = functools.partial(_end, self._inbox, thread, _End.AT_EXIT)
        self._end = weakref.finalize(self, _end_early, self._inbox, thread, at_exit)
        # At exit as well: a thread inside the engine must not outlive the interpreter. Not by the
        # finalizer, whose turn may come after the engine's own, when its threads return no more.
        self._end.atexit = False
        atexit.register(at_exit)

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        adapter: Any = None,
        sample: int = 0,
        on_step: Callable[[NativeHandle], None] | None = None,
    ) -> Future[Completion]:
        """Queue one sequence. Cancelling the future ends it at the next step.

        Args:
            on_step: called in the engine's thread, with its handle, after every step that the
                request took part in; it must be quick. An error in it ends the request.

        Raises:
            ClosedError: after `close`. RuntimeError: in a forked child. What `NativeClient.submit`
                refuses is raised by the future.
        """
        if os.getpid() != self._process:
            raise RuntimeError("the engine's thread is the parent process's; load a model here")
        request = _Request(tokens, params, adapter, sample, on_step)
        request.future.add_done_callback(request.cancel)
        with self._lock:
            self.check_open()
            self._inbox.put(request)
        return request.future

    def stream(
        self,
        tokens: list[int],
        params: SamplingParams,
        put: Callable[[str | None], None],
        *,
        adapter: Any = None,
        sample: int = 0,
    ) -> Future[Completion]:
        """`submit`, with the text in pieces of whole characters as it comes.

        Args:
            put: called with each piece, and with None behind the last one, however the request
                ended: in the engine's thread, or in the one that cancels. It must be quick.
        """
        check_streams(adapter)
        text = TextStream(self._tokenizer, params.stop, prompt_end(self._tokenizer, tokens))
        written = 0

        def on_step(handle: NativeHandle) -> None:
            nonlocal written
            if handle.finished:
                return
            new, _ = handle.sequence.read(written)
            written += len(new)
            if pieces := [piece for token in new if (piece := text.push(token))]:
                put("".join(pieces))

        def on_end(future: Future[Completion]) -> None:
            failed = future.cancelled() or future.exception() is not None
            whole = "" if failed else future.result().text
            if whole.startswith(text.sent) and len(whole) > len(text.sent):
                put(whole[len(text.sent) :])
            put(None)

        future = self.submit(tokens, params, adapter=adapter, sample=sample, on_step=on_step)
        future.add_done_callback(on_end)
        return future

    def check_open(self) -> None:
        """Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError("expected one that is open; it was closed")

    def close(self) -> None:
        """Cancel what is under way and end the thread. A second call does nothing."""
        with self._lock:
            self._closed = True
        self._end()


def _end_early(inbox: _Inbox, thread: threading.Thread, at_exit: Callable[[], None]) -> None:
    _end(inbox, thread, _End.CLOSED)
    atexit.unregister(at_exit)


def _end(inbox: _Inbox, thread: threading.Thread, how: _End) -> None:
    inbox.put(how)
    if thread is not threading.current_thread():
        thread.join()


def _drive(client: NativeClient, inbox: _Inbox) -> None:
    under_way: dict[NativeHandle, _Request] = {}
    while True:
        while not under_way or not inbox.empty():
            request = inbox.get()
            if isinstance(request, _End):
                # At exit all that wait are daemon threads. An error would be printed by them while
                # the interpreter takes stderr down, which it does not survive; they wait on.
                if request is _End.AT_EXIT:
                    under_way.clear()
                _abandon(client, under_way)
                return
            _admit(client, request, under_way)
        try:
            finished = client.step()
        except Exception as error:  # it ended everything in the engine, which is empty now
            for request in under_way.values():
                request.fail(error)
            _abandon(client, under_way)
            continue
        for handle, request in list(under_way.items()):
            _tell(handle, request)
        for handle in finished:
            ended = under_way.pop(handle, None)
            if ended is not None:
                _settle(handle, ended)


def _admit(
    client: NativeClient, request: _Request, under_way: dict[NativeHandle, _Request]
) -> None:
    if request.future.cancelled():
        return
    trace.add("queue", request.queued_ns)
    try:
        handle = client.submit(
            request.tokens, request.params, adapter=request.adapter, sample=request.sample
        )
    except Exception as error:  # it fails alone
        request.fail(error)
        return
    request.handle = handle
    under_way[handle] = request
    if request.future.cancelled():  # between the two looks
        handle.cancel()


def _tell(handle: NativeHandle, request: _Request) -> None:
    if request.on_step is None or request.future.done():
        return
    try:
        request.on_step(handle)
    except Exception as error:
        request.fail(error)
        handle.cancel()


def _settle(handle: NativeHandle, request: _Request) -> None:
    try:
        completion = handle.completion()
    except Exception as error:  # its own, such as NumericError
        request.fail(error)
        return
    with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
        request.future.set_result(completion)


def _abandon(client: NativeClient, under_way: dict[NativeHandle, _Request]) -> None:
    """End everything and let the engine retire it."""
    client.cancel()
    for request in under_way.values():
        request.fail(ClosedError("it was closed before it answered"))
    under_way.clear()
    with contextlib.suppress(Exception):  # what it met was said already
        while not client.idle():
            client.step()
