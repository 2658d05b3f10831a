"""A number that is measured in parts, and knows how the parts make the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# "mean": over what ``weight`` counts. "ratio": likewise, of what compares the weights with those
# that sampled. "count": adds up. "work": likewise, of what was done. "largest": the extreme.
# In PPO, "mean" and "count" speak of the first pass, the nearest to the weights that sampled.
Kind = Literal["mean", "ratio", "count", "work", "largest"]
OF_EVERY_PASS: tuple[Kind, ...] = ("ratio", "work", "largest")


@dataclass(frozen=True)
class Metric:
    """``sum / weight``: of a part, or of the whole that `merge_metrics` makes of the parts."""

    sum: float
    weight: float = 1.0
    kind: Kind = "mean"

    @property
    def value(self) -> float:
        return self.sum if self.weight == 1.0 else self.sum / self.weight


Metrics = Mapping[str, Metric]


def merge_metrics(parts: Sequence[Metrics]) -> dict[str, Metric]:
    """Every metric that any part has, as if the parts had been one."""
    if not parts:
        raise ValueError("expected at least one micro-batch, got none")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _merge([part[name] for part in parts if name in part]) for name in names}


def _merge(parts: Sequence[Metric]) -> Metric:
    kind = parts[0].kind
    if kind == "largest":
        return max(parts, key=lambda part: part.value)
    averaged = kind in ("mean", "ratio")
    weight = sum(part.weight for part in parts) if averaged else 1.0
    return Metric(sum(part.sum for part in parts), weight, kind)
