"""The mathematics of training as pure functions of aligned tensors: advantage, KL, loss."""

from __future__ import annotations

from alignpro.objective.adaptive_kl import AdaptiveKLController
from alignpro.objective.advantage import (
    MovingBaseline,
    group_normalized,
    reinforce,
    rloo,
    token_advantages,
    zero_advantage_groups,
)
from alignpro.objective.critic import gae, value_loss
from alignpro.objective.kl import future_kl, k1, k3, split_sequences, sum_per_sequence
from alignpro.objective.loss import LossResult, PolicyBatch, policy_loss
from alignpro.objective.metrics import OF_EVERY_PASS, Metric, Metrics, merge_metrics
from alignpro.objective.nested import allocate, allocations

__all__ = [
    "OF_EVERY_PASS",
    "AdaptiveKLController",
    "LossResult",
    "Metric",
    "Metrics",
    "MovingBaseline",
    "PolicyBatch",
    "allocate",
    "allocations",
    "future_kl",
    "gae",
    "group_normalized",
    "k1",
    "k3",
    "merge_metrics",
    "policy_loss",
    "reinforce",
    "rloo",
    "split_sequences",
    "sum_per_sequence",
    "token_advantages",
    "value_loss",
    "zero_advantage_groups",
]
