"""The closed-form optimum of the objective over a finite set of samples (MATH: the optimum).

    rho*(x'|x) = rho_sft(x'|x) exp(R(x, x') / kl_coef) / Z(x),   objective at rho*: kl_coef log Z(x)

On N rewrites drawn from rho_sft, rho_sft is the uniform weight 1/N and rho* a softmax. All
functions are vectorised over leading dimensions and work in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import Floats, law_of_total_variance


def optimum_weights(rewards: ArrayLike, kl_coef: float) -> Floats:
    """Weights [..., N] of rho* on samples of rho_sft with ``rewards`` [..., N]: they sum to 1.

    Raises ValueError for a kl_coef that is not above 0, and for rewards that are not finite.
    """
    weights = np.exp(_below_best(rewards, kl_coef)[0])
    normalised: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def optimum_objective(rewards: ArrayLike, kl_coef: float) -> Floats:
    """``kl_coef * log mean_i exp(R_i / kl_coef)`` over the last axis of ``rewards`` [..., N].

    The plug-in estimate of kl_coef log Z. Equal to the reward under `optimum_weights` less kl_coef
    times their `weights_kl`. Raises as `optimum_weights`.
    """
    below, best = _below_best(rewards, kl_coef)
    # expm1 and log1p: a large kl_coef multiplies what is rounded beside 1.
    objective: Floats = best + kl_coef * np.log1p(np.expm1(below).mean(axis=-1))
    return objective


def weights_kl(weights: ArrayLike) -> Floats:
    """KL of weights [..., N] to the uniform, ``sum_i w_i log(N w_i)``, in nats: 0 to log N."""
    w = np.asarray(weights, np.float64)
    logs = np.log(w * w.shape[-1], out=np.zeros_like(w), where=w > 0)  # 0 log 0 = 0
    kl: Floats = (w * logs).sum(axis=-1)
    return kl


def effective_samples(weights: ArrayLike) -> Floats:
    """``1 / sum_i w_i^2`` of weights [..., N] (Kish): from 1, where one has it all, to N."""
    w = np.asarray(weights, np.float64)
    count: Floats = 1.0 / (w * w).sum(axis=-1)
    return count


def shrunk_rewards(rewards: ArrayLike) -> Floats:
    """Rewards of the rewrites [P, N], shrunk to their own spread, without the responses' noise
    (empirical Bayes).

    The means over M responses of ``rewards`` [P, N, M] (N and M >= 2) vary by ``between + within /
    M``, where only ``between`` is the rewrites' own. They are drawn towards their prompt's mean by
    the root of the ratio of the two, so that their variance is ``between``. It is the root, not the
    ratio of a posterior mean: log Z depends on the spread of R, and posterior means spread
    less than what they estimate. One factor for all prompts: a prompt alone has too few samples.

    [derived] For Gaussian R and noise, kl_coef log Z = mean + between / (2 kl_coef), which this
    keeps; otherwise it is right to second order in 1 / kl_coef. Where the estimated ``between`` is
    not above 0, all rewrites of a prompt get its mean.
    """
    r = as_rewards(rewards)
    factor = np.sqrt(law_of_total_variance(r).share_of_means(r.shape[2]))
    means = r.mean(axis=2)
    centre = means.mean(axis=1, keepdims=True)
    shrunk: Floats = centre + factor * (means - centre)
    return shrunk


def as_rewards(rewards: ArrayLike) -> Floats:
    """``rewards`` as float64 [prompts >= 2, rewrites >= 2, responses >= 1], or a ValueError."""
    r = np.asarray(rewards, np.float64)
    if r.ndim != 3 or r.shape[0] < 2 or r.shape[1] < 2 or r.shape[2] < 1:
        raise ValueError(
            "rewards: expected [prompts >= 2, rewrites >= 2, responses >= 1], got shape "
            f"{list(r.shape)}"
        )
    if not np.isfinite(r).all():
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
    return r


def _below_best(rewards: ArrayLike, kl_coef: float) -> tuple[Floats, Floats]:
    """(R - max R) / kl_coef [..., N], which no kl_coef makes overflow, and max R [...]."""
    r = np.asarray(rewards, np.float64)
    if not kl_coef > 0 or not np.isfinite(kl_coef):
        raise ValueError(f"kl_coef: expected a number above 0, got {kl_coef!r}")
    if r.ndim < 1 or r.shape[-1] < 1:
        raise ValueError(f"rewards: expected at least one sample, got shape {list(r.shape)}")
    if not np.isfinite(r).all():
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
    best = r.max(axis=-1)
    with np.errstate(over="ignore"):  # to minus infinity, which has no weight
        below: Floats = (r - best[..., None]) / kl_coef
    return below, best
