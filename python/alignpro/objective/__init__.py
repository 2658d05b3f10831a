"""The mathematics of training as pure functions of aligned tensors: advantage, KL, loss."""

from __future__ import annotations

from alignpro.objective.advantage import kl_adjusted_rloo, rloo, zero_signal_groups
from alignpro.objective.kl import future_kl, k1, k3, sum_per_sequence
from alignpro.objective.loss import LossResult, PolicyBatch, merge_metrics, policy_loss

__all__ = [
    "LossResult",
    "PolicyBatch",
    "future_kl",
    "k1",
    "k3",
    "kl_adjusted_rloo",
    "merge_metrics",
    "policy_loss",
    "rloo",
    "sum_per_sequence",
    "zero_signal_groups",
]
