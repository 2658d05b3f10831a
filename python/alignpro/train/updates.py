"""The optimizer steps within one step: which trajectories each is taken over, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.config import TrainConfig
from alignpro.pipeline import derive_seed
from alignpro.train.trajectories import StepBatch

MINIBATCH_STREAM = 3  # of randomness; the pipeline has the ones before


@dataclass(frozen=True)
class Update:
    """One optimizer step."""

    step: int  # of the run
    rows: list[int]  # trajectories
    epoch: int  # passes over the batch done before
    fresh: bool  # under the weights that sampled: every ratio is exactly 1


def plan_updates(config: TrainConfig, batch: StepBatch, step: int) -> list[Update]:
    """The optimizer steps of a step, in order; none where nothing is learnt from.

    PPO: every pass goes over the prompts in an order keyed by (seed, step, pass), cut into
    minibatches of whole prompts whose sizes differ by one at most. Otherwise one over everything.
    """
    if not batch.groups:
        return []
    if config.algorithm != "ppo":
        return [Update(step, list(range(len(batch.trajectories))), 0, True)]
    updates: list[Update] = []
    for epoch in range(config.ppo.epochs):
        draw = np.random.default_rng(derive_seed(config.seed, MINIBATCH_STREAM, step, epoch))
        order = draw.permutation(len(batch.groups))
        for part in np.array_split(order, min(config.ppo.minibatches, len(order))):
            rows = [row for prompt in sorted(part) for row in batch.groups[prompt]]
            updates.append(Update(step, rows, epoch, not updates))
    return updates


def summarise(updates: Sequence[Update], metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates.

    Ratios are over all passes, the largest ones and the largest gradient norm included; what the
    policy is (loss, KL, entropy) is over the first pass, nearest to the weights that sampled.
    """
    every = [(m, len(u.rows)) for u, m in zip(updates, metrics, strict=True)]
    first = [(m, rows) for (m, rows), u in zip(every, updates, strict=True) if u.epoch == 0]
    summary: dict[str, float] = {}
    for name in metrics[0]:
        if name in _LARGEST:
            summary[name] = max(m[name] for m in metrics)
        elif name in _OF_THE_FRESH:
            summary[name] = metrics[0][name]
        elif name in _SUMS:
            summary[name] = sum(m[name] for m, _ in (every if name == "micro_batches" else first))
        else:
            over = every if name in ("ratio_mean", "clip_fraction") else first
            summary[name] = _mean(
                [m[name] for m, _ in over],
                [m["tokens"] if name in _TOKEN_MEANS else rows for m, rows in over],
            )
    return summary | {"updates": len(updates)}


_LARGEST = ("ratio_max", "grad_norm")
_OF_THE_FRESH = ("parity_max_abs", "learning_rate")
_SUMS = ("tokens", "micro_batches")
_TOKEN_MEANS = ("entropy", "ratio_mean", "clip_fraction", "value_loss")


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]  # as it is, to the bit
    weighted = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    return weighted / math.fsum(weights)
