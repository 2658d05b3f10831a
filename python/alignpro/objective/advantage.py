"""Advantages of rewrites against their siblings. P prompts, N rewrites of each."""

from __future__ import annotations

import torch
from torch import Tensor


def rloo(rewards: Tensor) -> Tensor:
    """REINFORCE with a leave-one-out baseline: ``A_i = R_i - mean_{j != i} R_j``.

    rewards: [P, N], one per rewrite (its responses' mean), N >= 2. Returns [P, N].
    Ahmadian et al. 2024 (arXiv 2402.14740). The baseline does not depend on rewrite i, so the
    gradient stays unbiased; nothing is divided by a spread, so a group without signal gives
    exactly 0 and cannot blow up. Raises ValueError for N < 2, another shape or non-finite rewards.
    """
    return _minus_mean_of_others(rewards, rewards)


def kl_adjusted_rloo(rewards: Tensor, kl_per_rewrite: Tensor, kl_coef: float) -> Tensor:
    """``A_i = R_i - mean_{j != i} (R_j - kl_coef * KL_j)``: the baseline knows the KL's cost too.

    rewards, kl_per_rewrite (nats, summed over a rewrite's tokens): [P, N], N >= 2. Returns [P, N].

    The return of token t is ``R_i - kl_coef * sum_{s>t} KL_s`` (``policy_loss`` subtracts the
    second part), and its expectation is near that of the siblings' ``R_j - kl_coef * KL_j``. The
    siblings are drawn independently of rewrite i, so the gradient stays unbiased for any such
    baseline [derived, as for RLOO]; this one has less variance where KL costs are a visible part of
    the return. All KL equal to 0, as in the first step, gives ``rloo``.
    """
    if kl_per_rewrite.shape != rewards.shape:
        raise ValueError(
            f"kl_per_rewrite: expected the shape of rewards {tuple(rewards.shape)}, "
            f"got {tuple(kl_per_rewrite.shape)}"
        )
    return _minus_mean_of_others(rewards, rewards - kl_coef * kl_per_rewrite.detach())


def zero_signal_groups(rewards: Tensor) -> int:
    """How many prompts have N equal rewards and so teach nothing. rewards: [P, N]."""
    _check_groups(rewards)
    return int((rewards == rewards[:, :1]).all(dim=1).sum())


def _minus_mean_of_others(values: Tensor, baselines: Tensor) -> Tensor:
    """``v_i - mean_{j != i} b_j`` for [P, N] each."""
    _check_groups(values)
    _check_groups(baselines)
    n = values.shape[1]
    # As a mean of differences, which are exactly 0 between equals; a difference of means is not.
    difference = values.unsqueeze(2) - baselines.unsqueeze(1)  # [P, N, N]
    difference = difference.masked_fill(torch.eye(n, dtype=torch.bool, device=values.device), 0.0)
    return difference.sum(dim=2) / (n - 1)


def _check_groups(values: Tensor) -> None:
    if values.dim() != 2:
        raise ValueError(f"rewards: expected shape [prompts, rewrites], got {tuple(values.shape)}")
    if values.shape[1] < 2:
        raise ValueError(
            f"rewards: expected at least 2 rewrites per prompt, got {values.shape[1]}; "
            "leave-one-out compares a rewrite with its siblings"
        )
    if not values.is_floating_point():
        raise ValueError(f"rewards: expected a floating point tensor, got {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
