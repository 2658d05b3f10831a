"""Where a sentence ends, also of a text that is still being written."""

from __future__ import annotations

import re

# What a model's text has at its end or before white space; a decimal point has a digit there.
_MARK = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|\n")
# Behind these a full stop ends no sentence, and behind the second only where a capital follows.
_NEVER = frozenset(
    ["e.g", "i.e", "mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "approx", "no", "fig"]
)
_SELDOM = frozenset(["etc", "a.m", "p.m", "inc", "jr", "sr"])
_LAST_WORD = re.compile(r"[\w.]*\w(?=[.\u2026]+[\"'\u201d\u2019)\]]*$)")
# Texts in which a sentence may have ended: what generation stops at, to be looked at.
STOPS = (". ", "! ", "? ", "\u2026 ", ".\n", "!\n", "?\n", "\n")


def sentence_end(text: str) -> int | None:
    """The index behind the first sentence of a text; None where none has certainly ended.

    A sentence ends at a full stop, question or exclamation mark, closing quotes included, before
    white space, and at the end of a line that says something. Spared are decimals (1.5), names of a
    letter (J. Smith), numbers of a list (2. Then), abbreviations (e.g.), and an ellipsis before a
    small letter.
    """
    for mark in _MARK.finditer(text):
        before = text[: mark.start()]
        if not before.strip():
            continue
        if mark[0] == "\n":
            return mark.start()
        if not _is_within(text[: mark.end()], mark[0], text[mark.end() :].lstrip()):
            return mark.end()
    return None


def _is_within(text: str, mark: str, following: str) -> bool:
    """Whether the mark at the end of ``text`` ends no sentence."""
    if not mark.startswith((".", "\u2026")):
        return False
    if mark.startswith(("..", "\u2026")):
        return following[:1].islower()
    found = _LAST_WORD.search(text)
    word = "" if found is None else found[0]
    if word.lower() in _NEVER:
        return True
    if word.lower() in _SELDOM:
        return not following[:1].isupper()
    letter = len(word) == 1 and word.isupper() and word != "I"
    line = text.rpartition("\n")[2]
    return letter or (word.isdigit() and line.strip() == f"{word}.")
