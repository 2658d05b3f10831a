"""The optimizer steps within one step: which trajectories each is taken over, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.config import TrainConfig
from alignpro.models.seeds import derive_seed
from alignpro.objective import OF_EVERY_PASS, Metrics, merge_metrics
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


def summarise(updates: Sequence[Update], metrics: Sequence[Metrics]) -> dict[str, float]:
    """Metrics of a step from those of its updates: over all passes, or over the first one alone, as
    their kind asks for."""
    merged = merge_metrics(metrics)
    first = merge_metrics([m for u, m in zip(updates, metrics, strict=True) if u.epoch == 0])
    summary = {n: (m if m.kind in OF_EVERY_PASS else first[n]).value for n, m in merged.items()}
    return summary | {"updates": len(updates)}
