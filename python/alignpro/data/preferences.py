"""Pairs of answers of which one was preferred.

Three forms, told apart by what a row holds:
* ``prompt`` (text or messages) beside ``chosen`` and ``rejected`` as texts, or as the messages that
  follow it;
* ``chosen`` and ``rejected`` as whole conversations, which differ in their last turn alone;
* the dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862), each one text whose turns begin with
  "Human:" and "Assistant:" behind a blank line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignpro.config import PreferencesConfig
from alignpro.data.files import DataError, Row
from alignpro.data.load import (
    PROMPT_COLUMNS,
    as_read,
    check_unicode,
    prompt_of,
    read_rows,
    value_of,
)
from alignpro.data.messages import chat_in_text, openai_form
from alignpro.types import Conversation, Prompt, text_messages, type_name

_log = logging.getLogger(__name__)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and two answers to it, of which the first was preferred; "" is an empty answer."""

    prompt: Prompt
    chosen: str
    rejected: str
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of its row, all
    place: str = field(default="", compare=False)


def load_preferences(source: PreferencesConfig) -> list[PreferenceRow]:
    """Rows of ``source`` as pairs, in the order of the source; answers without outer white space.
    Pairs of one answer twice say nothing: they are left out, and a warning counts them.

    Raises:
        DataError: as `load_prompts`; conversations that part before their last turn, or do not end
            in an answer; pairs of equal answers alone.
    """
    read = [_preference(row, source) for row in read_rows(source)]
    rows = [row for row in read if row.chosen != row.rejected]
    equal = len(read) - len(rows)
    if equal:
        said = f"{source.path}: {equal} of {len(read)} pairs have the same answer twice"
        if not rows:
            raise DataError(f"{said}; none is left to learn from")
        _log.warning("%s, and are left out", said)
    return rows


def _preference(row: Row, source: PreferencesConfig) -> PreferenceRow:
    columns = (source.chosen, source.rejected)
    places = [f"{row.place}, column {column!r}" for column in columns]
    values = [chat_in_text(row.values.get(column)) for column in columns]
    for column, value, key in zip(columns, values, ("chosen", "rejected"), strict=True):
        if value is None:
            value_of(row, column, key)  # says which columns there are
            raise DataError(f"{row.place}, column {column!r}: expected an answer, got null")
    for value, where in zip(values, places, strict=True):
        if not isinstance(value, Sequence):
            raise DataError(f"{where}: expected text or a chat, got {type_name(value)}")
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) == 1:
        raise DataError(
            f"{row.place}: expected {columns[0]!r} and {columns[1]!r} both as text or both as "
            "chats, got one of each"
        )
    has_prompt = source.prompt is not None or any(name in row.values for name in PROMPT_COLUMNS)
    if len(texts) == 2:
        for text, where in zip(texts, places, strict=True):
            check_unicode(text, where)
        if has_prompt:
            prompt = _asked(row, source, texts)
        else:
            shared, texts = _of_dialogues(row, texts)
            prompt = as_read(shared, source, places[0])
    else:
        ends = [_of_chat(value, where) for value, where in zip(values, places, strict=True)]
        (context, _), (other, _) = ends
        if context != other:
            raise DataError(f"{row.place}: {_PART_EARLY}")
        texts = [text for _, text in ends]
        if context is None:
            prompt = _asked(row, source, texts)
        elif has_prompt and context.messages[0]["role"] == "assistant":  # they follow it
            asked = Conversation.of(prompt_of(row, source)[1])
            prompt = as_read(_behind(asked, context), source, places[0])
        else:
            prompt = as_read(context, source, places[0])
    chosen, rejected = (text.strip() for text in texts)
    return PreferenceRow(prompt, chosen, rejected, row.values, row.place)


def _asked(row: Row, source: PreferencesConfig, answers: Sequence[str]) -> Prompt:
    """The prompt of a column of its own, behind which its messages may hold one of the answers."""
    names, prompt, reply, _ = prompt_of(row, source)
    if reply is not None and reply.strip() not in [text.strip() for text in answers]:
        raise DataError(
            f"{row.place}, column {names[0]!r}: expected a chat that ends in what is answered, got "
            "an answer at its end that is neither of the two"
        )
    return prompt


def _behind(asked: Conversation, following: Conversation) -> Conversation:
    """The prompt and the messages that follow it; these alone where they say it themselves."""
    if any(message["content"] == asked.last_turn for message in following.messages):
        return following
    return Conversation.of([*asked.messages, *following.messages])


_PART_EARLY = (
    "expected 'chosen' and 'rejected' to be alike up to their last turn, and they part before it"
)


def _of_chat(value: Any, where: str) -> tuple[Conversation | None, str]:
    """What is answered, None where the prompt has a column of its own, and the answer."""
    try:
        messages = text_messages(openai_form(value))
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(f"expected a chat that ends in an answer, got the roles {roles}")
        check_unicode(messages[-1]["content"], where)
        answered = messages[:-1]
        return Conversation.of(answered) if answered else None, messages[-1]["content"]
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{where}: {error}") from None


def _of_dialogues(row: Row, texts: Sequence[str]) -> tuple[Conversation, list[str]]:
    """The conversation that two dialogues begin with, and the turn that each ends with."""
    shorter = min(map(len, texts))
    alike = next((i for i in range(shorter) if texts[0][i] != texts[1][i]), shorter)
    turns = [turn for turn in _turns(texts[0]) if turn.end() <= alike]
    if not turns or texts[0][: turns[0].start()].strip():
        raise DataError(
            f"{row.place}: expected a column {PROMPT_COLUMNS[0]!r}, messages, or dialogues that "
            "begin with 'Human:' behind a blank line; data.prompt names another column"
        )
    ends = [turn.start() for turn in turns[1:]]
    said = [
        (_ROLES[turn[1]], texts[0][turn.end() : end].strip())
        for turn, end in zip(turns, ends, strict=False)
    ]
    ended = all([*_turns(text)][-1].end() == turns[-1].end() for text in texts)
    if turns[-1][1] != "Assistant" or len(turns) < 2 or not ended:
        raise DataError(f"{row.place}: {_PART_EARLY}")
    try:
        context = Conversation.of([{"role": role, "content": text} for role, text in said])
    except ValueError as error:
        raise DataError(f"{row.place}: {error}") from None
    return context, [text[turns[-1].end() :] for text in texts]


def _turns(text: str) -> Iterator[re.Match[str]]:
    """Where turns begin. A speaker's own name inside its turn is a part of what it says."""
    speaker = ""
    for found in _TURN.finditer(text):
        if found[1] != speaker:
            speaker = found[1]
            yield found
