"""One prompt on its way through a prompter, and what came of it, whole or in pieces."""

from __future__ import annotations

import asyncio
import logging
import math
import numbers
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alignpro import trace
from alignpro.config import GuardConfig
from alignpro.guards import broken_by
from alignpro.models.engine_thread import ClosedError
from alignpro.pipeline import Pipeline
from alignpro.types import Completion, Conversation, Message, Prompt, PromptLike, SamplingParams

_log = logging.getLogger(__name__)
_AT_ONCE = 2**11  # characters
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rewritten:
    """What the target is to be asked, and why.

    ``reason`` is "rewritten" where the rewrite is applied. Otherwise ``prompt`` is the original
    and the reason "deadline", "empty" (nothing was written), "unchanged", "guard_" and the name of
    the guard that was broken (see `broken_guard`), or "error", whose traceback is logged.
    """

    prompt: str | list[Message]  # text for text, messages for messages
    text: str  # what the prompter wrote; "" where it did not end
    applied: bool
    reason: str
    milliseconds: float  # since the call
    tokens: int = 0  # that the prompter wrote

    @classmethod
    def original(
        cls,
        given: PromptLike,
        reason: str,
        milliseconds: float = 0.0,
        text: str = "",
        tokens: int = 0,
    ) -> Rewritten:
        """Of a prompt that goes out as it was given."""
        if isinstance(given, str):
            prompt: str | list[Message] = given
        else:
            prompt = given.messages if isinstance(given, Conversation) else list(given)
        return cls(prompt, text, False, reason, milliseconds, tokens)

    @property
    def messages(self) -> list[Message]:
        """``prompt`` as a chat."""
        return Conversation.of(self.prompt).messages


class Clock:
    """Since a call. Raises ValueError for what is no deadline."""

    def __init__(self, deadline: float | None) -> None:
        self._begin = time.perf_counter()
        is_number = isinstance(deadline, numbers.Real) and not isinstance(deadline, bool)
        if deadline is not None and not (is_number and math.isfinite(deadline)):
            raise ValueError(f"deadline: expected seconds, or None, got {deadline!r}")
        # What the system's waits take, about 292 years.
        self._deadline = None if deadline is None else min(deadline, threading.TIMEOUT_MAX)

    @property
    def milliseconds(self) -> float:
        return (time.perf_counter() - self._begin) * 1e3

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no deadline."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self.milliseconds / 1e3)


@dataclass
class Request:
    """One prompt, as it was given and as it is read, on its way through the engine."""

    given: PromptLike
    prompt: Prompt
    index: int
    pipeline: Pipeline  # with the adapter that it began with
    tokens: list[int]
    params: SamplingParams
    future: Future[Completion] = field(default_factory=Future)

    @property
    def is_large(self) -> bool:
        """Whether guards read the last turn for a millisecond or more."""
        return len(Conversation.of(self.prompt).last_turn) > _AT_ONCE

    def rewritten(self, clock: Clock, guards: GuardConfig | None) -> Rewritten:
        """What came of it. Raises ClosedError, and ValueError where the engine refuses it."""
        if self.future.cancelled():
            return self._original("deadline", clock)
        error = self.future.exception()
        if isinstance(error, (ValueError, ClosedError)):
            raise error
        if error is not None:
            _log.error("no rewrite", exc_info=error)
            return self._original("error", clock)
        rewrite = self.pipeline.as_rewrite(self.prompt, self.index, self.future.result())
        count = len(rewrite.tokens)
        if not rewrite.text:
            return self._original("empty", clock, tokens=count)
        if rewrite.target_prompt == self.prompt:
            return self._original("unchanged", clock, rewrite.text, count)
        new = Conversation.of(rewrite.target_prompt)
        if guards is not None:
            with trace.span("guards"):
                broken = broken_by(rewrite, self.prompt, self.pipeline.prompting, guards)
            if broken is not None:
                return self._original(f"guard_{broken}", clock, rewrite.text, count)
        asked = new.plain if isinstance(self.given, str) else new.messages
        return Rewritten(asked, rewrite.text, True, "rewritten", clock.milliseconds, count)

    def _original(self, reason: str, clock: Clock, text: str = "", tokens: int = 0) -> Rewritten:
        return Rewritten.original(self.given, reason, clock.milliseconds, text, tokens)


async def beside(is_large: bool, work: Callable[..., Result], *arguments: Any) -> Result:
    """What the work gives: of what is large from a thread, so that the event loop goes on."""
    return await asyncio.to_thread(work, *arguments) if is_large else work(*arguments)


class Turn:
    """The last turn that the target is to be asked, in pieces as the prompter writes."""

    def __init__(self, request: Request, clock: Clock, guards: GuardConfig | None) -> None:
        self.result: Rewritten | None = None
        self._request, self._clock, self._guards = request, clock, guards
        turn, prompting = Conversation.of(request.prompt).last_turn, request.pipeline.prompting
        self._before = prompting.before_rewrite(turn)
        self._given = self._text = ""
        self._begin = turn if self._before else ""

    @property
    def is_large(self) -> bool:
        return self._request.is_large

    @property
    def left(self) -> float | None:
        """Seconds in which there may be more; a rewrite that was done in time may be read later."""
        future = self._request.future
        return 0.0 if future.cancelled() else None if future.done() else self._clock.left

    def push(self, text: str) -> str:
        """What is certain with this text of the prompter; outer spaces are no part of a rewrite."""
        self._text += text
        written = self._text.strip()
        return self._up_to(self._before + written if written else self._begin)

    def end(self) -> str:
        """The rest. Raises as `Request.rewritten`."""
        self.cancel()
        self.result = self._request.rewritten(self._clock, self._guards)
        return self._up_to(self.result.messages[-1]["content"])

    def cancel(self) -> None:
        self._request.future.cancel()

    def _up_to(self, turn: str) -> str:
        piece = turn[len(self._given) :] if turn.startswith(self._given) else ""
        self._given += piece
        return piece


class RewriteStream:
    """The last turn that the target is to be asked, piece by piece: an iterator of text.

    With mode append it begins with the prompt. All pieces together are the last turn of ``result``
    and the text that `Prompter.rewrite` gives with the same seed. Where the deadline passes, or a
    guard says no, when part of a rewrite was given already, that part cannot be taken back: the
    stream ends, and ``result`` has the original, not applied. Leaving the ``with`` block, `close`
    and dropping the stream end its request.
    """

    def __init__(self, turn: Turn, written: queue.SimpleQueue[str | None]) -> None:
        self._turn = turn
        self._pieces = _pieces(turn, written)
        weakref.finalize(self, turn.cancel)

    @property
    def result(self) -> Rewritten | None:
        """What became of it; None before the end."""
        return self._turn.result

    def __iter__(self) -> RewriteStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> RewriteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()
        self._turn.cancel()


class AsyncRewriteStream:
    """`RewriteStream` for an event loop. Cancelling who waits for a piece ends the request, too."""

    def __init__(self, turn: Turn, written: asyncio.Queue[str | None]) -> None:
        self._turn = turn
        self._pieces = _async_pieces(turn, written)
        weakref.finalize(self, turn.cancel)

    @property
    def result(self) -> Rewritten | None:
        """What became of it; None before the end."""
        return self._turn.result

    def __aiter__(self) -> AsyncRewriteStream:
        return self

    async def __anext__(self) -> str:
        return await self._pieces.__anext__()

    async def __aenter__(self) -> AsyncRewriteStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._pieces.aclose()
        self._turn.cancel()


def _pieces(turn: Turn, written: queue.SimpleQueue[str | None]) -> Generator[str, None, None]:
    try:
        text: str | None = ""
        while text is not None:
            if piece := turn.push(text):
                yield piece
            try:
                text = None if turn.left == 0 else written.get(timeout=turn.left)
            except queue.Empty:
                text = None
        if piece := turn.end():
            yield piece
    finally:
        turn.cancel()


async def _async_pieces(
    turn: Turn, written: asyncio.Queue[str | None]
) -> AsyncGenerator[str, None]:
    try:
        text: str | None = ""
        while text is not None:
            if piece := turn.push(text):
                yield piece
            try:
                text = None if turn.left == 0 else await asyncio.wait_for(written.get(), turn.left)
            except asyncio.TimeoutError:
                text = None
        if piece := await beside(turn.is_large, turn.end):
            yield piece
    finally:
        turn.cancel()
