"""The optimizer of every stage: AdamW, a schedule, and a gradient clipped by its norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from alignpro.config import FitConfig


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: FitConfig
) -> torch.optim.AdamW:
    """AdamW as the configuration has it."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def apply_gradients(
    optimizers: Mapping[torch.optim.Optimizer, float], *, max_grad_norm: float
) -> list[float]:
    """One step of each optimizer at its learning rate; returns the norms of their gradients, each
    clipped by its own.

    Raises:
        RuntimeError: a gradient of any is not finite; nothing has changed then.
    """
    norms = [
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]],
            max_grad_norm,
            error_if_nonfinite=True,
        )
        for optimizer in optimizers
    ]
    for optimizer, learning_rate in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return [float(norm) for norm in norms]
