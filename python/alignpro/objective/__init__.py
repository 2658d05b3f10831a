"""The mathematics of training as pure functions of aligned tensors: advantage, KL, loss."""

from __future__ import annotations

from alignpro.objective.adaptive_kl import AdaptiveKLController as AdaptiveKLController
from alignpro.objective.advantage import MovingBaseline as MovingBaseline
from alignpro.objective.advantage import group_normalized as group_normalized
from alignpro.objective.advantage import reinforce as reinforce
from alignpro.objective.advantage import rloo as rloo
from alignpro.objective.advantage import token_advantages as token_advantages
from alignpro.objective.advantage import zero_advantage_groups as zero_advantage_groups
from alignpro.objective.critic import gae as gae
from alignpro.objective.critic import value_loss as value_loss
from alignpro.objective.kl import future_kl as future_kl
from alignpro.objective.kl import k1 as k1
from alignpro.objective.kl import k3 as k3
from alignpro.objective.kl import split_sequences as split_sequences
from alignpro.objective.kl import sum_per_sequence as sum_per_sequence
from alignpro.objective.loss import LossResult as LossResult
from alignpro.objective.loss import PolicyBatch as PolicyBatch
from alignpro.objective.loss import policy_loss as policy_loss
from alignpro.objective.metrics import OF_EVERY_PASS as OF_EVERY_PASS
from alignpro.objective.metrics import Metric as Metric
from alignpro.objective.metrics import Metrics as Metrics
from alignpro.objective.metrics import merge_metrics as merge_metrics
from alignpro.objective.nested import allocate as allocate
from alignpro.objective.nested import allocations as allocations
