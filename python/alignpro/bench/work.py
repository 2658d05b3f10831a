"""The work of the step benchmark, the same for every side. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepWork:
    """One optimizer step: prompts x rewrites of an exact length, one exact response to each."""

    prompts: int = 4
    rewrites: int = 4  # a prompt
    rewrite_tokens: int = 48  # exactly, temperature 1
    response_tokens: int = 64  # exactly
    response_temperature: float = 0.7
    lora_rank: int = 16  # on every linear layer
    lora_alpha: float = 32.0
    kl_coef: float = 0.04
    learning_rate: float = 3e-4
    data: str = "everyday"
    split: str = "train"

    @property
    def generated_tokens(self) -> int:
        """Tokens that prompter and target write in one step."""
        return self.prompts * self.rewrites * (self.rewrite_tokens + self.response_tokens)


WORK = StepWork()
