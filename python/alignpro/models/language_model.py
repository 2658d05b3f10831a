"""The seam between a model and what drives it: requests go in, whatever finished comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Completion, SamplingParams


class Handle(Protocol):
    """One request under way."""

    def completion(self) -> Completion:
        """What was written. Raises RuntimeError before it is finished, and the request's own error
        (NumericError) where it failed."""


class Client(Protocol):
    """One caller's requests to a model. What is submitted advances only in `step`."""

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


class LanguageModel(Protocol):
    """Text in tokens, many requests at a time."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int:
        """Positions that prompt and completion share."""

    def client(self) -> Client:
        """For one caller: another's requests never come back from it."""
