"""A block of reasoning before an answer: where it ends, and what of a text is the answer."""

from __future__ import annotations

import re

from alignpro.types import FinishReason

_TAGS = {f"<{name}>": f"</{name}>" for name in ("think", "thinking", "thought", "reasoning")}
_TAGS |= {"[THINK]": "[/THINK]", "<seed:think>": "</seed:think>"}
TAGS = frozenset([*_TAGS, *_TAGS.values()])
_OPENED = re.compile(rf"\s*({'|'.join(map(re.escape, _TAGS))})")
# Of a prompt: what may end with the tag that opens a block, one byte a token and a line break.
OPENING_TOKENS = 16


def open_block(prompt: str) -> str | None:
    """What closes the block of reasoning that a prompt ends in; None where it ends in none."""
    end = prompt.rstrip()
    return next((close for begin, close in _TAGS.items() if end.endswith(begin)), None)


def split_reasoning(text: str, prompt: str | None = None) -> tuple[str | None, str]:
    """(answer, reasoning) of a text that may begin with a block of reasoning; None as the answer of
    one whose block is never closed.

    Args:
        prompt: the end of what the model read, which may have opened the block; None where that is
            not known, and "</think>" alone ends one.
    """
    opened = _OPENED.match(text)
    begin = opened.end() if opened else 0
    if opened:
        close = _TAGS[opened[1]]
    else:
        guess = "</think>" if prompt is None and "</think>" in text else None
        found = guess if prompt is None else open_block(prompt)
        if found is None:
            return text, ""
        close = found
    before, closed, after = text.rpartition(close)
    if closed:
        return after.lstrip(), before[begin:].strip()
    return None, text[begin:].strip()


def no_answer(answer: str | None, reasoning: str, finish_reason: FinishReason) -> str | None:
    """Why there is no answer; None where there is one, which may be empty."""
    if answer or (answer is not None and not reasoning and finish_reason != "length"):
        return None
    if finish_reason == "length":
        return (
            "no answer: the reply was cut (finish_reason length) before one began; allow more "
            "tokens, or turn the model's reasoning off"
        )
    return f"no answer: the reply is reasoning alone (finish_reason {finish_reason})"


class AnswerStream:
    """The answer of a text as it comes: `split_reasoning` in pieces. A block ends where it is first
    closed."""

    def __init__(self, prompt: str) -> None:
        self._close = open_block(prompt)
        self._state = "begin" if self._close is None else "reasoning"
        self._held = ""  # what is not certain yet

    def push(self, text: str) -> str | None:
        """What the text adds to the answer; None while that is not certain."""
        if self._state == "answer":
            return text
        self._held += text
        if self._state == "begin":
            opened = _OPENED.match(self._held)
            if opened is None:
                begun = self._held.lstrip()
                if any(tag.startswith(begun) for tag in _TAGS):
                    return None
                return self._answer(self._held)
            self._state, self._close = "reasoning", _TAGS[opened[1]]
            self._held = self._held[opened.end() :]
        if self._state == "reasoning":
            assert self._close is not None
            _, closed, after = self._held.partition(self._close)
            if not closed:
                self._held = self._held[1 - len(self._close) :]
                return ""
            self._state, self._held = "gap", after
        self._held = self._held.lstrip()
        return self._answer(self._held) if self._held else ""

    def _answer(self, text: str) -> str:
        self._state, self._held = "answer", ""
        return text
