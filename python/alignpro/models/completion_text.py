"""The text of a completion, whole or as it comes: cut at its stop string, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from alignpro.models.reasoning import AnswerStream
from alignpro.models.tokenizer import Tokenizer


def completion_text(
    tokenizer: Tokenizer, tokens: list[int], reason: str, matched_stop: str | None
) -> str:
    """What a completion says: without the EOS or stop id that ended it, cut at its stop string."""
    if matched_stop is None:
        return tokenizer.decode(tokens[:-1] if reason == "stop" else tokens)
    # The last token completed the stop string; an earlier one lies before min_new_tokens.
    data, stop = tokenizer.join_bytes(tokens), matched_stop.encode("utf-8")
    before = len(tokenizer.join_bytes(tokens[:-1]))
    cut = data.find(stop, max(before - len(stop) + 1, 0))
    text = data[:cut].decode("utf-8", "replace")
    return text.removeprefix(" ") if tokenizer.strips_space else text


class TextStream:
    """The answer in tokens as far as it is certain: whole characters, no beginning of a stop
    string, nothing of a block of reasoning.

    Args:
        prompt: the end of what was read, which may have opened the block.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt: str = "") -> None:
        self.sent = ""
        self._answer = AnswerStream(prompt)
        self._tokenizer = tokenizer
        self._stops = [_StopPrefix(stop) for stop in stops]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unsent = ""
        self._drop_space = tokenizer.strips_space

    def push(self, token: int) -> str | None:
        """What is added to the text that was sent; None while that is not certain."""
        new = self._decoder.decode(self._tokenizer.join_bytes([token]))
        self._unsent += new
        half_a_character = self._decoder.getstate()[0]
        # Of the text as it was written: a stop string may begin with the space that is dropped.
        begun = [stop.push(new) for stop in self._stops]
        if half_a_character or any(begun):
            return None
        text, self._unsent = self._unsent, ""
        if self._drop_space and text:
            text, self._drop_space = text.removeprefix(" "), False
        answer = self._answer.push(text)
        self.sent += answer or ""
        return answer


class _StopPrefix:
    """How much of a stop string the text ends with (Knuth, Morris, Pratt): work that grows with the
    text alone, however long the stop string."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._matched = 0
        self._shorter = [0]  # [i]: the longest shorter match where stop[: i + 1] is one
        for char in stop[1:]:
            self._shorter.append(self._next(self._shorter[-1], char))

    def push(self, text: str) -> bool:
        """Whether the text now ends with a beginning of the stop string, or all of it."""
        for char in text:
            self._matched = self._next(self._matched, char)
        return self._matched > 0

    def _next(self, matched: int, char: str) -> int:
        while matched and (matched == len(self._stop) or self._stop[matched] != char):
            matched = self._shorter[matched - 1]
        return matched + 1 if self._stop[matched] == char else 0
