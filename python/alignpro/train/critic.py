"""PPO's critic: the return that is expected after what the prompter has written so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignpro.objective import gae, split_sequences, value_loss


class ValueHead(torch.nn.Module):
    """A value for each hidden state of the policy, [T, D] -> [T]; 0 everywhere at the start.

    A layer normalisation and a linear layer. The states are the policy's and come without a
    gradient (`Policy.score`), so the head learns beside it and cannot disturb it.

    On rewrites of SmolLM2 of which 24 of 96 prompts are held out in turn, it explains 2 to 3% of
    the variance of the return over all tokens and 6 to 7% at the last one; a hidden layer of 64
    explains no more and takes more steps.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected 1 or more, got {hidden_size}")
        self.norm = torch.nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.out = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float32 [T, D], T may be 0. Returns [T], in units of the reward."""
        values: Tensor = self.out(self.norm(hidden)).squeeze(-1)
        return values


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
        self, hidden: Tensor, rewards: Tensor, kl: Tensor, sequence: Tensor, **options: float
    ) -> list[tuple[Tensor, Tensor]]:
        """`gae` under the values as they are; of every trajectory its (advantages, returns)."""
        both = gae(rewards, kl, self.head(hidden), sequence, **options)
        return list(zip(*(split_sequences(part, sequence) for part in both), strict=True))

    def loss(self, hidden: Tensor, returns: Tensor, *, total_tokens: int) -> Tensor:
        return value_loss(self.head(hidden), returns, total_tokens=total_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
