"""The optimizer of every stage: AdamW, a schedule, and a gradient clipped by its norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from alignpro.config import SftConfig, TrainConfig
from alignpro.train.schedule import learning_rate_factor


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: SftConfig | TrainConfig
) -> torch.optim.AdamW:
    """AdamW as the configuration has it."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def rate_factor(config: SftConfig | TrainConfig, step: int) -> float:
    """Multiplier of a learning rate at ``step``, by the configuration's schedule."""
    return learning_rate_factor(
        step,
        steps=config.steps,
        warmup_steps=config.warmup_steps,
        schedule=config.lr_schedule,
    )


def apply_gradients(
    optimizer: torch.optim.Optimizer, *, learning_rate: float, max_grad_norm: float
) -> float:
    """One step; returns the norm of the gradient before it was clipped.

    Raises:
        RuntimeError: a gradient is not finite; nothing has changed then.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    return float(norm)
