"""Advantages of rewrites: reward minus a baseline. P prompts, N rewrites of each.

What a token's choice costs later in KL is added by `token_advantages`; a baseline for every token
instead of one for a rewrite is `gae`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.objective.kl import future_kl

# Rewards that differ by less than their rounding (4 units in the last place of a float32) are
# equal: a mean over responses in another order differs that much, and AdamW makes a whole step of
# the smallest gradient.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


def rloo(rewards: Tensor) -> Tensor:
    """REINFORCE with a leave-one-out baseline: ``A_i = R_i - mean_{j != i} R_j``.

    rewards: [P, N], one per rewrite (its responses' mean), N >= 2. Returns [P, N].
    Ahmadian et al. 2024 (arXiv 2402.14740). The baseline does not depend on rewrite i, so the
    gradient stays unbiased; nothing is divided by a spread, and a group of equal rewards
    gives exactly 0. Raises ValueError for N < 2, another shape or non-finite rewards.
    """
    equal = zero_advantage_groups(rewards)
    n = rewards.shape[1]
    # As a mean of differences, which are exactly 0 between equals; a difference of means is not.
    difference = rewards.unsqueeze(2) - rewards.unsqueeze(1)  # [P, N, N]
    advantages = difference.sum(dim=2) / (n - 1)
    return advantages.masked_fill(equal.unsqueeze(1), 0.0)


def group_normalized(rewards: Tensor) -> Tensor:
    """``A_i = (R_i - mean_j R_j) / std_j R_j`` within a group.

    The advantage of GRPO (Shao et al. 2024, arXiv 2402.03300), whose loss is PPO's clipped one.

    rewards: [P, N], N >= 2; the deviation is the unbiased one (N - 1). Returns [P, N]. A group
    of equal rewards (`zero_advantage_groups`) gives exactly 0: nothing is divided by a deviation of
    about 0.

    The division changes what is optimised [derived]. With many rewrites a group the expected
    gradient at a prompt is that of ``E[R] / sigma - kl_coef * KL`` with sigma held fixed, so
    training rests where ``rho = rho_ref exp(R / (kl_coef * sigma)) / Z`` with sigma the standard
    deviation of R under that same rho: the KL's weight is ``kl_coef * sigma``, another for
    every prompt, and the smaller the more alike its rewrites' rewards have become.
    ``kl_coef * log Z`` is not the value reached. Raises as `rloo`.
    """
    equal = zero_advantage_groups(rewards).unsqueeze(1)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    deviation = rewards.std(dim=1, keepdim=True).masked_fill(equal, 1.0)
    return (centred / deviation).masked_fill(equal, 0.0)


@dataclass(frozen=True)
class MovingBaseline:
    """The exponential moving mean of the rewards of steps past: the baseline of `reinforce`.

    ``value`` is ``sum_k decay^k m_k / sum_k decay^k`` over the means m_k of the steps, k steps ago.
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float | None:
        """None before the first step."""
        return self.total / self.weight if self.weight > 0 else None

    def after(self, rewards: Tensor, decay: float) -> MovingBaseline:
        """With the rewards of one more step. decay: in [0, 1); 0 remembers one step."""
        if not rewards.numel():
            return self
        mean = float(rewards.double().mean())
        return MovingBaseline(decay * self.total + mean, decay * self.weight + 1.0)


def reinforce(rewards: Tensor, baseline: MovingBaseline) -> Tensor:
    """REINFORCE (Williams 1992) with a moving baseline: ``A = R - baseline``, [P, N] to [P, N].

    The baseline is of earlier steps: it contains none of the samples it is subtracted from, so the
    gradient stays unbiased. In the first step, which has no earlier one, it is the mean of the
    other samples of the step. Here alone a group of equal rewards does teach something: the whole
    group was better or worse than usual. Raises ValueError for another shape, non-finite rewards,
    or a first step of a single sample.
    """
    _check_rewards(rewards)
    if baseline.value is not None:
        return rewards - baseline.value
    if rewards.numel() < 2:
        raise ValueError("rewards: the first step's baseline needs at least 2 samples, got 1")
    return rloo(rewards.reshape(1, -1)).reshape(rewards.shape)


def token_advantages(advantage: Tensor, kl: Tensor, sequence: Tensor, kl_coef: float) -> Tensor:
    """``A_t = advantage_i - kl_coef * sum_{s>t} KL_s`` for token t of rewrite i. Detached.

    advantage: [S], one per rewrite. kl: [T], exact, nats. sequence: [T] integers, as for
    `future_kl`. Returns [T]. The second part is the half of the KL's gradient that goes through
    the choice of tokens (MATH: "KL").
    """
    if advantage.dim() != 1:
        raise ValueError(f"advantage: expected one dimension, got {tuple(advantage.shape)}")
    future = future_kl(kl, sequence)
    if sequence.numel() and int(sequence[-1]) >= advantage.numel():
        raise ValueError(
            f"sequence: expected indices below {advantage.numel()}, the number of advantages, "
            f"got {int(sequence[-1])}"
        )
    return advantage.detach()[sequence] - kl_coef * future


def zero_advantage_groups(rewards: Tensor) -> Tensor:
    """Which prompts have N equal rewards, up to rounding: boolean [P]. rewards: [P, N], N >= 2."""
    _check_rewards(rewards)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: expected at least 2 rewrites per prompt, got {rewards.shape[1]}; "
            "a group compares a rewrite with its siblings"
        )
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= _ROUNDING * rewards.abs().amax(dim=1)


def _check_rewards(rewards: Tensor) -> None:
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [prompts, rewrites], got {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards: expected a floating point tensor, got {rewards.dtype}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
