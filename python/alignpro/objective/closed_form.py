"""The optimum of the objective in closed form, and two losses that have it as their minimum.

P prompts, N rewrites of each, drawn from the reference (MATH: "The optimum, in closed form"):
``rho*(x'|x) = rho_ref(x'|x) exp(R(x, x') / kl_coef) / Z(x)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignpro.objective.kl import sum_per_sequence


def closed_form_weights(rewards: Tensor, kl_coef: float) -> Tensor:
    """Self-normalised weights of the reference's rewrites under rho*: [P, N], rows sum to 1.

    ``w_i = exp(R_i / kl_coef) / sum_j exp(R_j / kl_coef)``. rewards: [P, N], one per rewrite. In
    float64, from differences to the row's largest, so that a small kl_coef overflows nothing.
    Raises ValueError for another shape, rewards that are not finite, or kl_coef <= 0.
    """
    _check(rewards, kl_coef)
    r = rewards.to(torch.float64)
    return torch.softmax((r - r.max(dim=1, keepdim=True).values) / kl_coef, dim=1)


def effective_samples(weights: Tensor) -> Tensor:
    """Kish's effective sample size ``1 / sum_i w_i^2`` of each prompt's weights [P, N]: [P].

    N where all are equal, 1 where one has it all.
    """
    return 1.0 / weights.square().sum(dim=1)


def weighted_likelihood_loss(log_ratio: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """``-mean_x sum_i w_i log_ratio_i``, a scalar: minus the weighted log-likelihood.

    log_ratio, rewards: [P, N]; ``log rho(x'_i) - log rho_ref(x'_i)``, whose second part is a
    constant. w: `closed_form_weights`. For many rewrites it is ``KL(rho* || rho)`` up to a
    constant, whose minimum is rho*; for N of them the weights cannot ask for more than the best
    rewrite of N, and noise in the rewards chooses with them.
    """
    _check_aligned(log_ratio, rewards)
    weights = closed_form_weights(rewards, kl_coef).to(log_ratio.dtype)
    return -(weights * log_ratio).sum(dim=1).mean()


def log_variance_loss(log_ratio: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """``mean_x Var_i( R_i - kl_coef * log_ratio_i ) / (2 kl_coef)``, a scalar.

    log_ratio, rewards: as for `weighted_likelihood_loss`, N >= 2; the variance is that of a
    prompt's rewrites (N - 1 in the denominator). It is least where the log ratio is
    ``R / kl_coef`` up to a constant a prompt, that is at rho* alone, whatever drew the rewrites:
    the log-variance divergence to rho* (Richter et al. 2020, arXiv 2010.10436). At rho_ref its
    gradient is RLOO's. Linear in the rewards where the weights are exponential: the target's noise
    averages out over prompts, and N does not cap how far it goes.
    """
    _check_aligned(log_ratio, rewards)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: expected at least 2 rewrites per prompt, got {rewards.shape[1]}"
        )
    _check(rewards, kl_coef)
    short = rewards.to(log_ratio.dtype) - kl_coef * log_ratio
    return short.var(dim=1, unbiased=True).mean() / (2 * kl_coef)


def off_policy_kl(log_ratio: Tensor, kl: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """``sum_t (prod_{s<t} rho/rho_ref) KL_t`` of each rewrite drawn from rho_ref: [num_sequences].

    log_ratio, kl, sequence: [T], per token. Its mean over the reference's rewrites is KL(rho ||
    rho_ref) without bias: KL_t is exact, and the ratio carries the states that the prompter would
    visit. Its variance grows with the KL: of 64 rewrites at 1 nat, rows of a log read 0.7 to
    9. [derived]
    """
    if not log_ratio.numel():
        return log_ratio.new_zeros(num_sequences)
    _, run, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    before = log_ratio.double().cumsum(0) - log_ratio
    before = before - before[counts.cumsum(0) - counts][run]
    return sum_per_sequence(before.exp().to(kl.dtype) * kl, sequence, num_sequences)


def _check(rewards: Tensor, kl_coef: float) -> None:
    if rewards.dim() != 2 or not rewards.numel():
        raise ValueError(f"rewards: expected shape [prompts, rewrites], got {tuple(rewards.shape)}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
    if not (math.isfinite(kl_coef) and kl_coef > 0):
        raise ValueError(
            "kl_coef: expected a finite number above 0 (at 0 the optimum is the best rewrite "
            f"alone), got {kl_coef}"
        )


def _check_aligned(log_ratio: Tensor, rewards: Tensor) -> None:
    if log_ratio.shape != rewards.shape or rewards.dim() != 2:
        raise ValueError(
            "expected log_ratio and rewards of one shape [prompts, rewrites], got "
            f"{tuple(log_ratio.shape)} and {tuple(rewards.shape)}"
        )
