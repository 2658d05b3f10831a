"""The body of a chat request: what the prompter reads of it, and the place that a rewrite changes.

A rewrite is put into the bytes that came; everything around it stays as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.types import ROLES, Conversation

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ChatBody:
    """``conversation`` is None where there is nothing to rewrite, and ``reason`` says why:
    "not_json", "no_messages", "no_user_turn" (the last message is another's) or "no_text"."""

    raw: bytes
    model: str = ""
    conversation: Conversation | None = None
    reason: str = ""
    parts: int = 0  # of the last turn's text; 0: its content is a text
    last_part: int = 0  # place of the last one in the content

    @classmethod
    def read(cls, raw: bytes) -> ChatBody:
        """Raises nothing: what cannot be read is the upstream's to refuse."""
        try:
            body = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError):
            return cls(raw, reason="not_json")
        named = body.get("model") if isinstance(body, dict) else None
        model = named if isinstance(named, str) else ""
        messages = body.get("messages") if isinstance(body, dict) else None
        if not isinstance(messages, list) or not messages:
            return cls(raw, model, reason="no_messages")
        last = messages[-1]
        if not isinstance(last, dict) or last.get("role") != "user":
            return cls(raw, model, reason="no_user_turn")
        content = last.get("content")
        texts = _texts(content)
        turn = "\n".join(text for _, text in texts)
        if not turn.strip():
            return cls(raw, model, reason="no_text")
        parts = 0 if isinstance(content, str) else len(texts)
        conversation = Conversation(tuple(_history(messages[:-1])), turn)
        return cls(raw, model, conversation, "", parts, texts[-1][0])

    def with_last_turn(self, turn: str) -> bytes | None:
        """The same bytes with another last turn; None where it would replace several parts.

        What is appended goes behind the last text, so that its own bytes stay, too.
        """
        assert self.conversation is not None
        text = self.raw.decode("utf-8")
        place = _last_content(text)
        if self.parts:
            place = _member(text, _element(text, place, self.last_part), "text")
        old = self.conversation.last_turn
        end = _DECODER.raw_decode(text, place)[1]
        if turn.startswith(old):
            begin, new = end - 1, json.dumps(turn[len(old) :])[1:-1]
            end -= 1
        elif self.parts > 1:
            return None
        else:
            begin, new = place, json.dumps(turn)
        return b"".join((text[:begin].encode(), new.encode(), text[end:].encode()))


def _texts(content: Any) -> list[tuple[int, str]]:
    """(place, text) of what is text in the content of a message."""
    if isinstance(content, str):
        return [(0, content)]
    if not isinstance(content, list):
        return []
    found = []
    for place, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") == "text":
            text = part.get("text")
            if isinstance(text, str):
                found.append((place, text))
    return found


def _history(messages: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(role, text) of the messages that the prompter may be shown: calls of tools, their results
    and images are none of them."""
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") in ROLES:
            text = "\n".join(text for _, text in _texts(message.get("content")))
            if text.strip():
                yield str(message["role"]), text


# --- places in JSON text that is known to be right; a key that comes twice is the last one, as in
# json.loads ---


def _last_content(text: str) -> int:
    messages = _member(text, _SPACE.match(text).end(), "messages")  # type: ignore[union-attr]
    return _member(text, _element(text, messages, -1), "content")


def _member(text: str, begin: int, key: str) -> int:
    """Where the value of ``key`` begins in the object that begins there."""
    return next(at for name, at in reversed(list(_values(text, begin))) if name == key)


def _element(text: str, begin: int, place: int) -> int:
    return list(_values(text, begin))[place][1]


def _values(text: str, begin: int) -> Iterator[tuple[str, int]]:
    """(key, or "" in a list, where the value begins) of an object or a list."""
    is_object = text[begin] == "{"
    at = _skip(text, begin + 1)
    while text[at] not in "}]":
        key = ""
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # the colon
        yield key, at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
