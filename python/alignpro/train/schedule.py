"""What a step reads, how large it is, and the optimizer of every stage: AdamW, a schedule, and a
gradient clipped by its norm. No state but AdamW's own needs keeping for a resume."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from alignpro.config import FitConfig, TrainConfig


def batch_indices(*, seed: int, cursor: int, count: int, rows: int) -> list[int]:
    """Row numbers of the next ``count`` draws, ``cursor`` draws into the stream.

    The stream is one shuffled pass over ``rows`` rows after another, each shuffled by
    (seed, epoch). A batch may run over the end of a pass.
    """
    if rows < 1:
        raise ValueError("no rows to draw from")
    return [
        _permutation(seed, (cursor + i) // rows, rows)[(cursor + i) % rows] for i in range(count)
    ]


def count_prompts(config: TrainConfig, rows: int) -> int:
    """Prompts that the closed form rolls out, of so many. Raises ValueError for too few."""
    count = config.closed_form.num_prompts
    if count is not None and count > rows:
        raise ValueError(
            f"closed_form.num_prompts: expected at most the {rows} prompts there are, got {count}"
        )
    return count or rows


def rate_factor(config: FitConfig, step: int) -> float:
    """Multiplier of the learning rate at ``step`` in 0..steps-1.

    Warm-up climbs in equal parts to 1 at step ``warmup_steps``; "linear" then falls so that a step
    beyond the last would be 0.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    return (config.steps - step) / max(1, config.steps - config.warmup_steps)


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: FitConfig
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def load_optimizer() -> None:
    """Import what torch loads with its first optimizer, 80 MB, so that it is counted before."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def apply_gradients(
    optimizers: Mapping[torch.optim.Optimizer, float], *, max_grad_norm: float
) -> list[float]:
    """One step of each optimizer at its learning rate; returns the norms of their gradients, each
    clipped by its own. RuntimeError where a gradient is not finite; nothing has changed then."""
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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, epoch]).permutation(rows).tolist())
