"""The bound on how far a prompted target may fall short of a tuned one, term by term.

For rewards in a range of width r_max, pi* any tuned target, and rho* the optimum at kl_coef
(MATH: bound):

    J(pi*) - J(rho*)  <=  r_max E_x[ TV(pi*(.|x), pi_F(.|x)) + E_{x' ~ rho_sft} TV(pi_F(.|x),
                          pi_F(.|x')) ]  -  kl_coef E_x KL(rho* || rho_sft)

J is the mean reward. Three steps, each of which may be loose: J(pi*) - J(pi_F) <= r_max TV;
J(pi_F) - J(rho_sft) <= r_max E TV; and J(rho_sft) - J(rho*) <= -kl_coef KL(rho* || rho_sft), which
also holds for a trained prompter whose objective is above the untuned one's, with its own KL.

Responses are whole token sequences of the process that is run: one cut off at its last allowed
token stands for all of its continuations, in the total variation and in what is measured alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import Floats, Interval, bootstrap_mean_ci
from alignpro.theory.optimum import optimum_weights


@dataclass(frozen=True)
class Bound:
    """Every term, the bound and the gap: means over prompts, intervals by bootstrap over them."""

    reward_range: tuple[float, float]
    kl_coef: float
    # tv_tuned: TV(pi*(.|x), pi_F(.|x)), in [0, 1]; tv_rewrites: E_{x' ~ rho_sft} TV(pi_F(.|x),
    # pi_F(.|x')), in [0, 1]; kl: KL(rho* || rho_sft), nats.
    terms: dict[str, Interval]
    bound: Interval  # r_max * (tv_tuned + tv_rewrites) - kl_coef * kl
    measured_gap: Interval  # J(pi*) - J(rho*)
    slack: Interval  # bound - measured_gap, paired by prompt
    holds: bool  # slack's mean is not below 0
    vacuous: bool  # the bound is no less than the range, which no gap can exceed


def prompting_bound(
    *,
    reward_range: tuple[float, float],
    kl_coef: float,
    tv_tuned: ArrayLike,
    tv_rewrites: ArrayLike,
    kl: ArrayLike,
    gap: ArrayLike,
    seed: int = 0,
) -> Bound:
    """The bound from its terms, each [P] over the same prompts, P >= 2.

    Raises:
        ValueError: a range without width, a kl_coef not above 0, terms of other lengths, a total
            variation outside [0, 1] or a KL below 0.
    """
    low, high = reward_range
    if not low < high:
        raise ValueError(f"reward_range: expected [low, high] with low < high, got {reward_range}")
    if not kl_coef > 0:
        raise ValueError(f"kl_coef: expected a number above 0, got {kl_coef}")
    terms = {"tv_tuned": tv_tuned, "tv_rewrites": tv_rewrites, "kl": kl, "gap": gap}
    arrays = {name: np.asarray(values, np.float64) for name, values in terms.items()}
    for name, array in arrays.items():
        if array.shape != arrays["gap"].shape or array.ndim != 1:
            raise ValueError(
                f"{name}: expected one number a prompt, {list(arrays['gap'].shape)}, got shape "
                f"{list(array.shape)}"
            )
    tolerance = 1e-9  # of sums of float64
    for name, most in (("tv_tuned", 1.0), ("tv_rewrites", 1.0), ("kl", np.inf)):
        values = arrays[name]
        if (values < -tolerance).any() or (values > most + tolerance).any():
            raise ValueError(
                f"{name}: expected numbers from 0 to {most}, got {values.min()} to {values.max()}"
            )
    bounds = (high - low) * (arrays["tv_tuned"] + arrays["tv_rewrites"]) - kl_coef * arrays["kl"]
    intervals = {name: bootstrap_mean_ci(array, seed=seed) for name, array in arrays.items()}
    slack = bootstrap_mean_ci(bounds - arrays["gap"], seed=seed)
    bound = bootstrap_mean_ci(bounds, seed=seed)
    return Bound(
        reward_range=(low, high),
        kl_coef=kl_coef,
        measured_gap=intervals.pop("gap"),
        terms=intervals,
        bound=bound,
        slack=slack,
        holds=slack.mean >= 0,
        vacuous=bound.mean >= high - low,
    )


def total_variation_samples(logprob: ArrayLike, other_logprob: ArrayLike) -> Floats:
    """``max(0, 1 - q(y) / p(y))`` of samples y ~ p, any shape; its mean is unbiased for TV(p, q).

    Args:
        logprob: log p(y) of whole sequences, natural logarithm, under the distribution that they
            were drawn from. other_logprob: log q(y); -inf where q cannot write y.

    Raises:
        ValueError: unlike shapes, or a log p(y) that is not finite (y was drawn, so p(y) > 0).
    """
    p, q = np.asarray(logprob, np.float64), np.asarray(other_logprob, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"other_logprob: expected shape {list(p.shape)}, got {list(q.shape)}")
    if not np.isfinite(p).all() or np.isnan(q).any():
        raise ValueError("logprob: expected finite numbers, got NaN or infinity")
    samples: Floats = -np.expm1(np.minimum(q - p, 0.0))
    return samples


def tilted_total_variation(rewards: ArrayLike, kl_coef: float) -> Floats:
    """TV(pi*, pi_F) [P] for pi* = pi_F exp(r / kl_coef) / Z, from ``rewards`` [P, K] of pi_F's own.

    ``1/2 E_{y ~ pi_F} |w - 1|`` with w = exp(r / kl_coef) / Z, and Z the mean over the prompt's K
    responses. A response's reward is known exactly, so there is no noise to correct; finite K
    biases it low, as it does the reward of pi*, and it cannot exceed 1 - 1 / K.
    """
    weights = optimum_weights(rewards, kl_coef)
    variation: Floats = 0.5 * np.abs(weights - 1 / weights.shape[-1]).sum(axis=-1)
    return variation
