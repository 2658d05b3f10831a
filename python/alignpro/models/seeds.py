"""Seeds of the parts of a run."""

from __future__ import annotations

import operator
import os

_MASK = 2**64 - 1


def derive_seed(seed: int, *keys: int) -> int:
    """A 64-bit seed for a part of a run, from the run's seed and the part's keys.

    Each key passes through the splitmix64 finaliser, so neighbouring keys give unrelated seeds.
    A pure function: what is drawn for prompt 3 does not depend on what else is in the batch.

    Raises ValueError: the seed is no integer.
    """
    try:
        state = operator.index(seed) & _MASK
    except TypeError:
        raise ValueError(f"seed: expected an integer, or None, got {seed!r}") from None
    for key in keys:
        state = _splitmix64(state ^ _splitmix64(key & _MASK))
    return state


def _splitmix64(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")
