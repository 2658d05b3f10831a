"""PPO's value head in training: its values, its loss and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignpro.objective import gae, split_sequences, value_loss


@dataclass(frozen=True)
class TokenTargets:
    """Of every trajectory of a step: one value a token it wrote."""

    advantages: list[torch.Tensor]
    returns: list[torch.Tensor]


class Critic:
    """A value head over the policy's hidden states, with an AdamW of its own.

    head: a module that maps hidden states [T, D] to values [T].
    """

    def __init__(self, head: torch.nn.Module, *, learning_rate: float) -> None:
        self.head = head
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def targets(
        self,
        hidden: torch.Tensor,
        rewards: torch.Tensor,
        kl: torch.Tensor,
        sequence: torch.Tensor,
        *,
        kl_coef: float,
        gae_lambda: float,
    ) -> TokenTargets:
        """Advantages and returns under the values as they are; arguments as for `gae`."""
        advantages, returns = gae(
            rewards,
            kl,
            self.head(hidden),
            sequence,
            kl_coef=kl_coef,
            gae_lambda=gae_lambda,
        )
        return TokenTargets(
            list(split_sequences(advantages, sequence)), list(split_sequences(returns, sequence))
        )

    def loss(
        self, hidden: torch.Tensor, returns: Sequence[torch.Tensor], *, total_tokens: int
    ) -> torch.Tensor:
        """Half the mean squared error, as a part of an update of ``total_tokens``."""
        return value_loss(self.head(hidden), torch.cat(list(returns)), total_tokens=total_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
