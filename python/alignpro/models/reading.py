"""Prompts of any form; what a model reads of one, as tokens, and whether it fits."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignpro.config import Prompting
from alignpro.models.arguments import refuse_rows
from alignpro.models.language_model import LanguageModel
from alignpro.models.soft_prompt import SoftRows, chat_tokens
from alignpro.models.tokenizer import Tokenizer, count_words
from alignpro.types import Conversation, Prompt, PromptLike, SamplingParams

PROBE = "a"  # the shortest text
# Tokens of a byte, at most: a token is a byte or more, but normalisation may add some, and a
# template could write a turn twice.
_TOKENS_A_BYTE = 2


def read_prompts(prompts: Sequence[PromptLike]) -> list[Prompt]:
    """Prompts of any form in their short form.

    Raises:
        ValueError: not a list of them, or what is no prompt; the message names the index.
    """
    if isinstance(prompts, (str, bytes, Mapping, Conversation)):
        raise ValueError(f"prompts: expected a list of prompts, got {type(prompts).__name__}")
    refuse_rows(prompts)
    read = []
    for index, prompt in enumerate(prompts):
        with naming(f"prompt {index}"):
            read.append(Conversation.of(prompt).short)
    return read


def check_columns(columns: Mapping[str, Sequence[Any]] | None, count: int) -> None:
    """Refuse columns that are not aligned with ``count`` prompts."""
    for name, values in (columns or {}).items():
        if isinstance(values, str):
            raise ValueError(f"column {name}: expected a list of {count} values, got text")
        if len(values) != count:
            raise ValueError(f"column {name}: expected {count} values, got {len(values)}")


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """A ValueError inside says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_roles(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
    """Refuse a conversation that the chat template refuses for its roles (a system message, two
    turns of one side). Raises ValueError, which names the index of the prompt."""
    seen = set()
    for index, prompt in enumerate(prompts):
        roles = tuple(role for role, _ in Conversation.of(prompt).history)
        if roles and roles not in seen:
            seen.add(roles)
            with naming(f"prompt {index}"):
                target_tokens(tokenizer, prompt, most=1)


def target_tokens(
    tokenizer: Tokenizer, prompt: Prompt, rows: SoftRows | None = None, most: int | None = None
) -> list[int]:
    """rows: of the adapter that reads it (`soft_rows`). most: as of `Tokenizer.encode`.

    Raises ValueError; see `chat_tokens`.
    """
    return chat_tokens(tokenizer, Conversation.of(prompt).messages, rows, most)


def prompter_tokens(
    tokenizer: Tokenizer,
    prompting: Prompting,
    prompt: Prompt,
    context: int,
    written: int,
    rows: SoftRows | None = None,
) -> list[int]:
    """The turn that the prompter reads, with as much of the history as a context of so many tokens
    holds beside those to be written. Where none of it is left, or is to be cut, it may still be
    longer (as of `Tokenizer.encode` with ``most``, the context). rows: as of `target_tokens`.

    Raises ValueError; see `chat_tokens`.
    """

    def encode(turn: str) -> list[int]:
        return chat_tokens(tokenizer, [{"role": "user", "content": turn}], rows, context)

    turns, most = prompting.prompter_turns(prompt), context - written
    tokens = encode(turns[0])
    if len(tokens) <= most or len(turns) == 1:
        return tokens
    fits = bisect_left(turns, True, lo=1, key=lambda turn: len(encode(turn)) <= most)
    return encode(turns[min(fits, len(turns) - 1)])


def too_long(model: LanguageModel, tokens: int, params: SamplingParams) -> str | None:
    """Why a model cannot read so many tokens and write what ``params`` ask for; None if it can.
    tokens: encoded with ``most``, the model's context."""
    limit = model.context_length
    if tokens + params.max_new_tokens <= limit:
        return None
    return (
        f"{count_words(tokens, limit)} and {params.max_new_tokens} new ones exceed the context of "
        f"{model.name} ({limit} tokens); shorten it or lower max_new_tokens"
    )


class ChatLengths:
    """Whether chats fit a model's context in its template, most of them without being read.

    params: how what is written behind them is drawn. rows: as of `target_tokens`.
    """

    def __init__(
        self, model: LanguageModel, params: SamplingParams, rows: SoftRows | None = None
    ) -> None:
        self._model, self._params, self._rows = model, params, rows
        self._around: dict[tuple[str, ...], int] = {}  # tokens of a chat of such roles

    def unread(self, prompt: Prompt, more: int = 0) -> str | None:
        """Why the model cannot read a chat and ``more`` tokens; None where it can."""
        conversation = Conversation.of(prompt)
        if self.surely_holds(conversation, more):
            return None
        return too_long(self._model, self._count(conversation) + more, self._params)

    def surely_holds(self, conversation: Conversation, more: int = 0) -> bool:
        """By its bytes: reading a chat takes a millisecond, of which data has many."""
        roles = tuple(role for role, _ in conversation.history)
        if roles not in self._around:
            probe = Conversation(tuple((role, PROBE) for role in roles), PROBE)
            self._around[roles] = self._count(probe)
        texts = [text for _, text in conversation.history] + [conversation.last_turn]
        size = sum(len(text.encode()) for text in texts)
        most = self._model.context_length - self._params.max_new_tokens
        return self._around[roles] + _TOKENS_A_BYTE * size + more <= most

    def _count(self, conversation: Conversation) -> int:
        model = self._model
        return len(target_tokens(model.tokenizer, conversation, self._rows, model.context_length))
