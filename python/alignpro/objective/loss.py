"""The loss of reinforcement learning with a KL penalty: tensors in, loss and metrics out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.objective.kl import k1, k3, split_sequences
from alignpro.objective.metrics import Metric


@dataclass(frozen=True)
class PolicyBatch:
    """S rewrites with T tokens in all, one after another.

    Every token here counts: a rewrite that should not be learnt from is left out, not masked.
    """

    logprob: Tensor  # [T] log rho(x'_t | h_t) under the current weights; carries the gradient
    kl: Tensor  # [T] exact KL(rho || rho_ref) at h_t, nats; carries the gradient
    entropy: Tensor  # [T] of rho at h_t, nats; a metric only
    reference_logprob: Tensor  # [T] of the same token under the reference
    sampled_logprob: Tensor  # [T] as recorded when the token was drawn
    sequence: Tensor  # [T] integers, non-decreasing: the rewrite, 0..S-1, that a token belongs to
    # [T] return minus baseline, the KL of later tokens included: `token_advantages`, or `gae`
    advantage: Tensor


@dataclass(frozen=True)
class LossResult:
    loss: Tensor  # scalar; carries the gradient
    metrics: dict[str, Metric]


def policy_loss(
    batch: PolicyBatch,
    kl_coef: float,
    *,
    total_rewrites: int,
    clip_range: float | None = None,
) -> LossResult:
    """Minus a surrogate of ``E[R] - kl_coef * KL(rho || rho_ref)``, in nats per rewrite.

        loss = 1/total_rewrites * sum_i sum_{t in i} ( -ratio_t * A_t  +  kl_coef * KL_t )
        A_t  = R - baseline - kl_coef * sum_{s>t} KL_s        (detached; the batch brings it)
        ratio_t = exp(logprob_t - sampled_logprob_t)

    Sums run over tokens and the mean over rewrites: no division by length, so that the gradient is
    that of the objective itself. Both halves of the KL are needed: differentiating KL_t alone
    forgets that a token decides which states follow (MATH: "KL"; arXiv 2506.09477).

    total_rewrites: rewrites in the whole optimiser step. Micro-batches given the same number add
    up to the loss and the gradient of one batch of all of them.

    On the first pass over fresh samples the ratio is exactly 1 (the same log-probability is
    recorded and recomputed) and the gradient is exact. On later passes the ratio corrects each
    token for the weights that drew it; the states stay those that were drawn, for KL_t as well:
    the first-order approximation of Schulman et al. 2017 (arXiv 1707.06347). ``clip_range`` is
    their epsilon: ``min(ratio A, clip(ratio, 1-eps, 1+eps) A)``; None does not clip.

    Metrics: sums over tokens, as means over the batch's rewrites ("loss", "policy_loss", "kl_loss",
    "*_per_rewrite"), means over tokens ("entropy", "ratio_mean", "clip_fraction"), and extremes
    ("ratio_max"); ratios are those before clipping. ``merge_metrics`` joins those of micro-batches.
    Raises ValueError for tensors that are empty, not aligned, or not finite.
    """
    _check(batch, kl_coef, total_rewrites, clip_range)
    advantage = batch.advantage.detach()
    ratio = torch.exp(batch.logprob - batch.sampled_logprob.detach())
    gain = ratio * advantage
    clipped_tokens = 0.0
    if clip_range is not None:
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
        clipped_tokens = float((clipped < gain).sum())
        gain = torch.minimum(gain, clipped)
    policy_part, kl_part = -gain.sum(), kl_coef * batch.kl.sum()
    total = policy_part + kl_part

    tokens, rewrites = float(batch.logprob.numel()), float(batch.sequence[-1] + 1)
    with torch.no_grad():
        sums = {
            "loss": total,
            "policy_loss": policy_part,
            "kl_loss": kl_part,
            "kl_per_rewrite": batch.kl.sum(),
            "k1_per_rewrite": k1(batch.logprob, batch.reference_logprob).sum(),
            "k3_per_rewrite": k3(batch.logprob, batch.reference_logprob).sum(),
        }
        metrics = {
            **{name: Metric(float(value), rewrites) for name, value in sums.items()},
            "entropy": Metric(float(batch.entropy.sum()), tokens),
            "ratio_mean": Metric(float(ratio.sum()), tokens, "ratio"),
            "ratio_max": Metric(float(ratio.max()), kind="largest"),
            "clip_fraction": Metric(clipped_tokens, tokens, "ratio"),
            "tokens": Metric(tokens, kind="count"),
        }
    return LossResult(total / total_rewrites, metrics)


def _check(
    batch: PolicyBatch, kl_coef: float, total_rewrites: int, clip_range: float | None
) -> None:
    shape = batch.sequence.shape
    split_sequences(batch.sequence, batch.sequence)  # refuses what is no sequence
    for name, tensor in vars(batch).items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected shape [{shape[0]}] as sequence, got {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):  # the sequence's integers are
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if not batch.sequence.numel():
        raise ValueError("expected at least one rewrite token, got an empty batch")
    rewrites = int(torch.unique_consecutive(batch.sequence).numel())
    if total_rewrites < rewrites:
        raise ValueError(
            f"total_rewrites: expected at least the {rewrites} rewrites here, got {total_rewrites}"
        )
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef: expected a finite number >= 0, got {kl_coef}")
    if clip_range is not None and not 0 < clip_range < 1:
        raise ValueError(f"clip_range: expected a number in (0, 1) or None, got {clip_range}")
