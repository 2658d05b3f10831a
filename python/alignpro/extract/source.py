"""What a text says: where values and quantities occur in it."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right

from alignpro.extract.formula import plain_formula
from alignpro.extract.kinds import Leaf
from alignpro.extract.units import PERCENT, PLAIN, Quantity, normalise, quantities_in

Span = tuple[int, int]
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")
_DOT = r"\s?[.*\u00b7\u2219\u22c5\u2022]\s?"  # of a hydrate
_SAME = 1e-9  # relative: what is one number in two units


class Source:
    """A text that records are taken from."""

    def __init__(self, text: str) -> None:
        self._plain = normalise(text)
        self._lower = self._plain.lower()
        self._quantities = quantities_in(text)
        self._words = [
            (match.span(), float(_WORDS.index(match[0])))
            for match in _NUMBER_WORD.finditer(self._lower)
        ]

    def spans(self, value: str | float, leaf: Leaf) -> list[Span]:
        """Where the value of a field occurs; a number in the base units of its dimension."""
        if isinstance(value, str):
            if leaf.kind == "formula":
                parts = plain_formula(value).split("\u00b7")
                return _occurrences(_DOT.join(map(re.escape, parts)), self._plain)
            return _occurrences(re.escape(normalise(value).lower()), self._lower)
        spans = [span for span, q in self._quantities if _is(value, leaf, q)]
        if leaf.unit is None:
            spans += [span for span, number in self._words if number == value]
        return sorted(spans)


def _is(value: float, leaf: Leaf, quantity: Quantity) -> bool:
    if leaf.unit is None:  # a bare number is one whatever is counted
        return same_number(quantity.value, value)
    unit = quantity.unit
    if leaf.unit.name == PERCENT:
        return unit is not None and unit.name == PERCENT and same_number(quantity.value, value)
    alike = unit is not None and unit.dimension == leaf.dimension != PLAIN
    return alike and same_number(quantity.in_base(), value)


def same_number(one: float, other: float) -> bool:
    """Whether two numbers are one but for the rounding of a unit's scale."""
    return math.isclose(one, other, rel_tol=_SAME, abs_tol=0.0)


def are_near(ours: list[Span], theirs: list[Span], most: float) -> bool:
    """Whether one of each lie beside each other with ``most`` characters between them. What
    overlaps does not: the same words are not beside themselves."""
    begins = sorted(begin for begin, _ in theirs)
    ends = sorted(end for _, end in theirs)
    for begin, end in ours:
        behind = bisect_left(begins, end)
        if behind < len(begins) and begins[behind] - end <= most:
            return True
        before = bisect_right(ends, begin)
        if before and begin - ends[before - 1] <= most:
            return True
    return False


def _occurrences(pattern: str, text: str) -> list[Span]:
    """Whole words alone: "tin" is not in "tincture"."""
    whole = re.compile(rf"(?<![^\W_]){pattern}(?![^\W_])")
    return [match.span() for match in whole.finditer(text)]
