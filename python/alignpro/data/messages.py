"""Messages as other tools write them: ShareGPT's, an Arrow table's, and as text in a cell."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|"""
_ELEMENT = re.compile(rf"({_QUOTED}\}})(\s+(?=['\"{{]))?", re.DOTALL)
_BRACKET = re.compile(rf"{_QUOTED}[\[\]]", re.DOTALL)
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")


def openai_form(chat: Any) -> Any:
    """ShareGPT's messages as {"role", "content"}, and those of an Arrow table that has a list of
    each; others as they are."""
    columns = list(chat.values()) if isinstance(chat, Mapping) else []
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        chat = [dict(zip(chat, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if not isinstance(chat, Sequence) or isinstance(chat, (str, bytes)):
        return chat
    messages = []
    for index, message in enumerate(chat):
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            role = _SHAREGPT_ROLES.get(str(message["from"]))
            if role is None:
                known = ", ".join(_SHAREGPT_ROLES)
                raise ValueError(
                    f"message {index}: expected 'from' to be one of {known}, got "
                    f"{message['from']!r}"
                )
            message = {**message, "role": role, "content": message["value"]}
        messages.append(message)
    return messages


def chat_in_text(value: Any) -> Any:
    """The messages that a text is written for (`list_in_text`). Anything else as it is."""
    chat = list_in_text(value)
    messages = isinstance(chat, list) and all(isinstance(m, dict) for m in chat)
    if messages and chat and all(m.keys() & {"role", "from"} for m in chat):
        return chat
    return value


def list_in_text(value: Any) -> Any:
    """The list that a text is the JSON of, or what Python prints of it: a table has no lists.
    Anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for read in (json.loads, _printed):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    return value


def _printed(text: str) -> Any:
    """Of an array of NumPy, such as pandas writes, no commas part the elements."""
    commas = _ELEMENT.sub(lambda found: found[1] + "," * (found[2] is not None), text)
    return ast.literal_eval(commas.strip())


def is_cut_chat(text: str) -> bool:
    """Whether a text that is no messages begins as they do, and ends within them or with them."""
    if not _MESSAGES.match(text):
        return False
    depth = 0
    for found in _BRACKET.finditer(text):
        depth += {"[": 1, "]": -1}.get(found[0], 0)
        if not depth:
            return not text[found.end() :].strip()
    return True
