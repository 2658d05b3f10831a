"""The seams between a model and what drives it: requests go in, whatever finished comes out.

A `LanguageModel` takes tokens and is stepped: the engine. A `ChatModel` takes conversations: what
is behind an endpoint. The prompter is the first of them, a target either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Chat, Completion, SamplingParams


class Handle(Protocol):
    """One request under way."""

    def completion(self) -> Completion:
        """What was written. Raises RuntimeError before it is finished, and the request's own error
        (NumericError, RequestError) where it failed."""


class Requests(Protocol):
    """One caller's requests to a model, which advance in `step`."""

    def step(self) -> Sequence[Handle]:
        """Advance everything under way, whoever submitted it; returns the requests of this client
        that have finished, or failed, since the last call."""

    def launch(self) -> None:
        """Put the next step under way, for who drives several models: one that computes elsewhere
        than on this thread is at it until `step`, which then ends this step."""

    def ready(self) -> bool:
        """Whether `step` would not wait for a step that was launched."""

    def cancel(self) -> None:
        """End everything at the next step, with what is written by then."""

    def idle(self) -> bool:
        """Whether nothing of this client is left for `step` to return."""


class Client(Requests, Protocol):
    """One caller's requests to a `LanguageModel`: tokens in, tokens out."""

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        adapter: Any = None,
        sample: int = 0,
    ) -> Handle:
        """Queue one sequence; ``params.n`` is not looked at. Draws are keyed by
        (params.seed, sample, position).

        Raises:
            ValueError: an empty prompt, one over the context, or parameters out of range.
        """


class ChatClient(Requests, Protocol):
    """One caller's requests to a `ChatModel`: a conversation in, text out."""

    def submit(self, conversation: Chat, params: SamplingParams, *, sample: int = 0) -> Handle:
        """Queue one answer; ``params.n`` is not looked at."""


class Reads(Protocol):
    """What says how a model reads, and how much: without its weights, too."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int:
        """Positions that prompt and completion share."""


@runtime_checkable
class LanguageModel(Reads, Protocol):
    """Text in tokens, many requests at a time."""

    def client(self) -> Client:
        """For one caller: another's requests never come back from it."""


class ChatModel(Protocol):
    """Conversations, many at a time, by a model that shows no tokens."""

    @property
    def name(self) -> str: ...

    def client(self) -> ChatClient:
        """For one caller: another's requests never come back from it."""


class RequestError(RuntimeError):
    """A request got no answer, after all its retries; others are as they were.

    Args:
        accept: called where the run goes on without the answer, for it to be the same when it is
            replayed.
    """

    def __init__(self, message: str, accept: Callable[[], None] = lambda: None) -> None:
        super().__init__(message)
        self.accept = accept
