"""A sequence that was submitted to the native engine, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from alignpro.models.completion_text import completion_text
from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Completion, FinishReason

if TYPE_CHECKING:
    from alignpro.native import core


class NativeHandle:
    """One sequence in the engine. Any thread may read and cancel it."""

    def __init__(self, sequence: core.Sequence_, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self._tokenizer = tokenizer

    @property
    def finished(self) -> bool:
        return self.sequence.finished

    def cancel(self) -> None:
        self.sequence.cancel()

    def completion(self) -> Completion:
        """What was written.

        Raises:
            RuntimeError: it is not finished. Whatever ended it: NumericError where
                no token could be drawn.
        """
        sequence = self.sequence
        reason = sequence.finish_reason
        if reason is None:
            raise RuntimeError("the sequence is not finished; step() the model until it is")
        if reason == "failed":
            sequence.raise_error()
        tokens = sequence.tokens
        return Completion(
            tokens=tokens,
            text=completion_text(self._tokenizer, tokens, reason, sequence.matched_stop),
            logprobs=sequence.logprobs,
            kept_mass=sequence.kept_mass,
            finish_reason=cast(FinishReason, reason),
            prompt_tokens=sequence.prompt_tokens,
        )
