"""What checks compute with: numbers that there are, and when two values are one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from alignpro.extract.scope import UncomputableError
from alignpro.extract.units import normalise

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


def comparable(value: Any) -> Any:
    """Texts without case and spelling of their characters; numbers as they are."""
    return normalise(value).casefold() if isinstance(value, str) else value


def compare(sign: str, a: Any, b: Any) -> bool:
    """Numbers are equal but for rounding."""
    if sign in ("==", "!="):
        same = a == b
        if isinstance(a, float) and isinstance(b, float):
            same = math.isclose(a, b, rel_tol=1e-9)
        return bool(same == (sign == "=="))
    return bool({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign])
