"""What a step reads and how large it is: pure functions of the step, so a resume needs no state."""

from __future__ import annotations

import functools

import numpy as np

from alignpro.config import FitConfig


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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, epoch]).permutation(rows).tolist())
