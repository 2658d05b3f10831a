"""The text of a completion, whole or as it comes: cut at its stop string, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

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
    """Text of tokens as far as it is certain: whole characters, no beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.sent = ""
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unsent = ""
        self._drop_space = tokenizer.strips_space

    def push(self, token: int) -> str | None:
        """The text since the last that was sent; None while its end is not certain."""
        self._unsent += self._decoder.decode(self._tokenizer.join_bytes([token]))
        if self._drop_space and self._unsent:
            self._unsent = self._unsent.removeprefix(" ")
            self._drop_space = False
        half_a_character = self._decoder.getstate()[0]
        if half_a_character or _ends_in_beginning(self._unsent, self._stops):
            return None
        text, self._unsent = self._unsent, ""
        self.sent += text
        return text


def _ends_in_beginning(text: str, stops: Sequence[str]) -> bool:
    """Whether ``text`` ends with what a stop string begins with."""
    return any(text.endswith(stop[:size]) for stop in stops for size in range(1, len(stop) + 1))
