"""What checks compute with: numbers that there are, and when two values are one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from alignpro.extract.scope import UncomputableError

_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "max": max,
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
}


def finite(value: float) -> float:
    """Raises UncomputableError for one that a float does not hold."""
    if not math.isfinite(value):
        raise UncomputableError("a number that is too large")
    return value


def reduced(name: str, values: list[float]) -> float:
    """min, max, sum or mean. Raises UncomputableError."""
    try:
        return finite(_REDUCTIONS[name](values))
    except OverflowError:  # of fsum
        raise UncomputableError("a number that is too large") from None


def compare(sign: str, a: Any, b: Any) -> bool:
    """Numbers are equal, and in order, but for rounding."""
    if sign in ("==", "!="):
        same = a == b
        if isinstance(a, float) and isinstance(b, float):
            same = math.isclose(a, b, rel_tol=1e-9)
        return bool(same == (sign == "=="))
    if sign[0] == ">":
        a, b = b, a
    return at_most(a, b) if sign[1:] else not at_most(b, a)


def at_most(one: float, other: float) -> bool:
    """But for the rounding of a change of units."""
    return one <= other or math.isclose(one, other, rel_tol=1e-12)
