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

    Ratios are over all passes, and what the policy is (KL, entropy) over the first, nearest to the
    weights that sampled; "grad_norm" and "ratio_max" are the largest.
    """
    first = [(len(u.rows), m) for u, m in zip(updates, metrics, strict=True) if u.epoch == 0]
    every = [(len(u.rows), m) for u, m in zip(updates, metrics, strict=True)]
    summary: dict[str, float] = {}
    for name in metrics[0]:
        over = every if name in ("ratio_mean", "clip_fraction", "micro_batches") else first
        values = [m[name] for _, m in over]
        if name in ("ratio_max", "grad_norm"):
            summary[name] = max(m[name] for _, m in every)
        elif name in ("tokens", "micro_batches"):
            summary[name] = sum(values)
        elif len(values) == 1:
            summary[name] = values[0]
        else:
            by_token = name in ("entropy", "ratio_mean", "clip_fraction")
            weights = [m["tokens"] if by_token else rows for rows, m in over]
            weighted = math.fsum(w * v for w, v in zip(weights, values, strict=True))
            summary[name] = weighted / math.fsum(weights)
    return summary | {"updates": len(updates)}
