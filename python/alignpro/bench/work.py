"""The work of the benchmarks, the same for every side. numpy and the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RolloutWork:
    """prompt -> rewrites -> a response to each, which end where they end."""

    prompts: int = 16
    rewrites: int = 4  # a prompt
    rewrite_tokens: int = 48  # at most
    response_tokens: int = 64  # at most
    data: str = "everyday"
    split: str = "train"


@dataclass(frozen=True)
class StepWork(RolloutWork):
    """One optimizer step: rewrites, at temperature 1, and responses have exactly these lengths."""

    prompts: int = 4
    response_temperature: float = 0.7
    lora_rank: int = 16  # on every linear layer
    lora_alpha: float = 32.0
    kl_coef: float = 0.04
    learning_rate: float = 3e-4

    @property
    def generated_tokens(self) -> int:
        return self.prompts * self.rewrites * (self.rewrite_tokens + self.response_tokens)


ROLLOUT = RolloutWork()
WORK = StepWork()


def random_prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """Distinct prompts of random ids: nothing to share, and an exact length."""
    draw = np.random.default_rng(length)
    ids = draw.integers(0, vocab_size, (batch, length))
    return [[int(token) for token in row] for row in ids]
