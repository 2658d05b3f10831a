"""PPO's part of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from alignpro.config.fields import checked, require


@dataclass(frozen=True)
@checked
class PpoConfig:
    """Several passes over a batch, with clipped ratios (Schulman et al. 2017, arXiv 1707.06347)."""

    clip_range: float = 0.2  # epsilon: a ratio beyond 1 +- this earns nothing more
    epochs: int = 2  # passes over a step's rewrites
    minibatches: int = 2  # optimizer steps a pass; whole prompts each
    # A learned baseline for every token; without one, the mean of the rewrite's siblings.
    value_head: bool = False
    gae_lambda: float = 0.95  # with value_head; 1: its advantages do not trust the values
    value_learning_rate: float = 1e-3  # with value_head; follows the policy's schedule

    def __post_init__(self) -> None:
        require("clip_range", self.clip_range, 0 < self.clip_range < 1, "between 0 and 1")
        require("epochs", self.epochs, self.epochs >= 1, "1 or more")
        require("minibatches", self.minibatches, self.minibatches >= 1, "1 or more")
        require("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "0 to 1")
        rate = self.value_learning_rate
        require("value_learning_rate", rate, rate > 0, "above 0")
        if not self.value_head:
            for name in ("gae_lambda", "value_learning_rate"):
                value = getattr(self, name)
                default = type(self).__dataclass_fields__[name].default
                require(name, value, value == default, f"{default} unless value_head is true")
