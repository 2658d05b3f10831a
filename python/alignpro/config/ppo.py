"""PPO's part of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignpro.config.fields import Range, above, at_least, checked, only_default


@dataclass(frozen=True)
@checked
class PpoConfig:
    """Several passes over a batch, with clipped ratios (Schulman et al. 2017, arXiv 1707.06347)."""

    # epsilon: a ratio beyond 1 +- this earns nothing more.
    clip_range: Annotated[float, Range(lambda v: 0 < v < 1, "between 0 and 1")] = 0.2
    epochs: Annotated[int, at_least(1)] = 2  # passes over a step's rewrites
    minibatches: Annotated[int, at_least(1)] = 2  # optimizer steps a pass; whole prompts each
    # A learned baseline for every token; without one, the mean of the rewrite's siblings.
    value_head: bool = False
    # With value_head; 1: its advantages do not trust the values.
    gae_lambda: Annotated[float, Range(lambda v: 0 <= v <= 1, "0 to 1")] = 0.95
    # With value_head; follows the policy's schedule.
    value_learning_rate: Annotated[float, above(0)] = 1e-3

    def __post_init__(self) -> None:
        if not self.value_head:
            for name in ("gae_lambda", "value_learning_rate"):
                only_default(self, name, "with value_head")
