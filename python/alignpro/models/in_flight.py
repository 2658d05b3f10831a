"""Requests in flight on one model or several, driven until all are finished or left out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignpro import trace
from alignpro.models.language_model import (
    ChatClient,
    ChatModel,
    Client,
    Handle,
    LanguageModel,
    RequestError,
)
from alignpro.models.reasoning import no_answer
from alignpro.types import Completion


class FailedRowsError(RuntimeError):
    """More responses failed than may be left out."""


@dataclass(frozen=True)
class Request:
    """What is to be done with one completion."""

    what: str  # how an error names it
    span: str  # what a trace calls the work on it
    on_finished: Callable[[Completion | None], None]  # None: it failed, and is left out
    wants_answer: bool = False  # a completion without an answer has failed


class InFlight:
    """Requests in flight on one model or several; what finishes may add more.

    Leaving the block by an exception, Ctrl-C included, cancels everything still in flight.

    Args:
        rows: responses that are wanted in all. max_failed: the share of them that may be left out.
    """

    def __init__(
        self, rows: int, max_failed: float, on_progress: Callable[[int], None] | None = None
    ) -> None:
        self.generated_tokens = 0
        self.failed: list[str] = []
        self._rows, self._max_failed = rows, max_failed
        self._accepted: list[RequestError] = []
        self._finished = 0
        self._on_progress = on_progress
        self._pending: dict[Handle, Request] = {}
        self._clients: dict[LanguageModel | ChatModel, Client | ChatClient] = {}

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for client in self._clients.values():
            client.cancel()
            # A step retires what was cancelled; an error here would hide the one that led here.
            with contextlib.suppress(Exception):
                while not client.idle():
                    client.step()

    def client(self, model: LanguageModel) -> Client:
        client: Client = self._client(model)
        return client

    def chat_client(self, model: ChatModel) -> ChatClient:
        client: ChatClient = self._client(model)
        return client

    def _client(self, model: LanguageModel | ChatModel) -> Any:
        if model not in self._clients:
            self._clients[model] = model.client()
        return self._clients[model]

    def leave_out(self, reason: str) -> None:
        """Count a response that there will be none of.

        Raises:
            FailedRowsError: there are too many of them; never for the first, but with
                ``max_failed`` 0 or where it leaves nothing.
        """
        self.failed.append(reason)
        self._finished += 1
        allowed = max(1, int(self._max_failed * self._rows)) if self._max_failed else 0
        if len(self.failed) > min(allowed, self._rows - 1):
            raise FailedRowsError(
                f"{len(self.failed)} of {self._rows} responses failed, more than target.max_failed "
                f"({self._max_failed:g}) allows; the last: {reason}"
            )

    def add(self, handle: Handle, request: Request) -> None:
        self._pending[handle] = request

    def run_until_done(self) -> None:
        """Step every model until nothing is in flight.

        Each has a step under way while another's is awaited, and none waits for one that is slower.
        """
        while self._pending:
            for client in self._clients.values():
                client.launch()
            finished = [handle for client in self._ready() for handle in client.step()]
            if not finished and all(client.idle() for client in self._clients.values()):
                raise RuntimeError(
                    f"{len(self._pending)} requests neither finished nor in flight in "
                    f"{', '.join(model.name for model in self._clients)}"
                )
            for handle in finished:
                request = self._pending.pop(handle)
                with trace.span(request.span):
                    request.on_finished(self._completion(request, handle))
            if finished and self._on_progress is not None:
                self._on_progress(self._finished)
        for failure in self._accepted:
            failure.accept()

    def _completion(self, request: Request, handle: Handle) -> Completion | None:
        try:
            completion = handle.completion()
        except ArithmeticError as error:  # NumericError: it failed alone
            raise type(error)(f"{request.what}: {error}") from None
        except RequestError as error:
            self._accepted.append(error)
            self.leave_out(f"{request.what}: {error}")
            return None
        self.generated_tokens += completion.num_tokens
        if request.wants_answer and not completion.answered:
            missing = no_answer(None, completion.reasoning, completion.finish_reason)
            self.leave_out(f"{request.what}: {missing}")
            return None
        self._finished += 1
        return completion

    def _ready(self) -> list[Client | ChatClient]:
        """Those whose step has ended, waited for; where but one has work, that one at once."""
        busy = [client for client in self._clients.values() if not client.idle()]
        while len(busy) > 1:
            ready = [client for client in busy if client.ready()]
            if ready:
                return ready
            time.sleep(_POLL_SECONDS)
        return busy


_POLL_SECONDS = 2e-5  # a hundredth of a step of a model that is worth a GPU
