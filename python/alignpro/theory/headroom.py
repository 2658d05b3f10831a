"""What a prompter can gain, before any training, from rewards of the untuned one's rewrites.

Given N rewrites a prompt from rho_sft and M responses a rewrite, three estimates of the best
objective kl_coef log Z (MATH: the optimum; each claim is tested by simulation; docs/theory.md):

* **plain**: the plug-in on the N means over M responses. Finite N biases it low: about ``kl_coef /
  2 (1 / effective_samples - 1 / N)``. Noise in the means biases it high (Jensen).
* **cross-fitted** (M >= 2): weights from all responses but one, the reward from that one, averaged
  over which is left out. It is the objective of a policy that exists, so at most kl_coef log Z in
  expectation. [derived] Its KL to rho_sft is at most the weights': the chain rule and data
  processing, as the same draws with a uniform choice give rho_sft.
* **corrected** (M >= 2): the plug-in on `shrunk_rewards`, with the leave-one-out jackknife over
  rewrites (Quenouille 1956) for the bias of finite N. The nearest of the three; no bound.

Where `effective_samples` is a few, all three are too low. The forecast for training is [untuned
reward, upper end of the plain estimate's interval].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, log

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import (
    Floats,
    Interval,
    VarianceSplit,
    bootstrap_mean_ci,
    law_of_total_variance,
)
from alignpro.theory.optimum import (
    as_rewards,
    effective_samples,
    optimum_objective,
    optimum_weights,
    shrunk_rewards,
    weights_kl,
)

# With Gaussian rewards the effective share of the samples is exp(-(deviation / kl_coef)^2): a third
# is where the deviation of R is about kl_coef itself, and the plug-in's bias by finite N about
# 1 / N of kl_coef.
SUPPORTED_SHARE = 1 / 3


@dataclass(frozen=True)
class FrontierPoint:
    """The optimum at one kl_coef; means over prompts, intervals by bootstrap over prompts."""

    kl_coef: float
    objective: Interval  # plain
    gain: Interval  # objective less the untuned reward, paired by prompt
    reward: float  # sum_i w_i R_i
    kl: float  # sum_i w_i log(N w_i), nats
    effective_samples: float  # 1 / sum_i w_i^2, of N
    crossfit_objective: Interval | None = None  # None where M is 1, here and below
    crossfit_reward: float | None = None
    crossfit_kl: float | None = None
    corrected_objective: Interval | None = None


@dataclass(frozen=True)
class BestOf:
    n: int
    reward: float  # expected largest R_hat: optimistic where M is finite
    crossfit_reward: float | None  # chosen by M - 1 responses, judged by the one left out
    kl: float  # log n - (n - 1) / n: an upper bound on the KL to rho_sft, nats


@dataclass(frozen=True)
class Headroom:
    num_prompts: int
    num_rewrites: int
    num_responses: int
    untuned: Interval  # mean reward of all samples
    frontier: list[FrontierPoint]  # by rising kl_coef
    best_of_n: list[BestOf]
    recommended_kl_coef: float | None
    variance: VarianceSplit | None

    @property
    def recommended(self) -> FrontierPoint | None:
        return next((p for p in self.frontier if p.kl_coef == self.recommended_kl_coef), None)


def headroom(rewards: ArrayLike, kl_coefs: Sequence[float], *, seed: int = 0) -> Headroom:
    """The frontier over ``kl_coefs``, best-of-n, and a recommended kl_coef.

    Args:
        rewards: [P, N, M]: P >= 2 prompts, N >= 2 rewrites drawn from rho_sft, M >= 1 responses.
        seed: of the bootstrap.

    Raises:
        ValueError: another shape, numbers that are not finite, no kl_coef or one not above 0.
    """
    r = as_rewards(rewards)
    if not len(kl_coefs):
        raise ValueError("kl_coefs: expected at least one, got none")
    untuned = r.mean(axis=(1, 2))
    shrunk = shrunk_rewards(r) if r.shape[2] >= 2 else None
    frontier = [_point(r, shrunk, untuned, k, seed) for k in sorted({float(k) for k in kl_coefs})]
    return Headroom(
        num_prompts=r.shape[0],
        num_rewrites=r.shape[1],
        num_responses=r.shape[2],
        untuned=bootstrap_mean_ci(untuned, seed=seed),
        frontier=frontier,
        best_of_n=best_of_n(r),
        recommended_kl_coef=recommended_kl_coef(frontier, r.shape[1]),
        variance=None if r.shape[2] < 2 else law_of_total_variance(r),
    )


def recommended_kl_coef(frontier: Sequence[FrontierPoint], num_rewrites: int) -> float | None:
    """The smallest kl_coef whose mean effective sample size is at least a third of N.

    A smaller one promises more, and the promise rests on one or two rewrites a prompt; a larger one
    gives reward away. It is the smallest kl_coef that these samples can speak for: more rewrites
    support a smaller one. None where the whole grid is below.
    """
    supported = [
        point.kl_coef
        for point in frontier
        if point.effective_samples >= SUPPORTED_SHARE * num_rewrites
    ]
    return min(supported, default=None)


def crossfit(rewards: ArrayLike, kl_coef: float) -> tuple[Floats, Floats]:
    """(reward, KL), each [P], of choosing a rewrite by M - 1 responses and judging it by the other.

    Averaged over the response of ``rewards`` [P, N, M] (M >= 2) that judges. ``reward - kl_coef *
    KL`` is in expectation at most kl_coef log Z: see the module.
    """
    r = as_rewards(rewards)
    folds = [(optimum_weights(chosen, kl_coef), judged) for chosen, judged in _folds(r)]
    reward: Floats = np.mean([(w * judged).sum(axis=1) for w, judged in folds], axis=0)
    kl: Floats = np.mean([weights_kl(w) for w, _ in folds], axis=0)
    return reward, kl


def corrected_objective(shrunk: ArrayLike, kl_coef: float) -> Floats:
    """kl_coef log Z [P] from rewards without noise [P, N], N >= 2, by the jackknife over rewrites.

    ``N V - (N - 1) mean_j V(all but j)`` takes out the bias of order 1 / N.
    """
    q = np.asarray(shrunk, np.float64)
    n = q.shape[1]
    left_out = [optimum_objective(np.delete(q, j, axis=1), kl_coef) for j in range(n)]
    estimate: Floats = n * optimum_objective(q, kl_coef) - (n - 1) * np.mean(left_out, axis=0)
    return estimate


def best_of_n(rewards: ArrayLike) -> list[BestOf]:
    """Expected reward of the best of n of the N rewrites, n = 1 ... N, over ``rewards`` [P, N, M].

    Exact over all subsets: the i-th smallest of N is the largest of n with probability
    C(i - 1, n - 1) / C(N, n). The KL of best-of-n is at most log n - (n - 1) / n
    (arXiv 2401.01879).
    """
    r = as_rewards(rewards)
    count, responses = r.shape[1:]
    means = np.sort(r.mean(axis=2), axis=1)
    folds = [_ranked(chosen, judged) for chosen, judged in _folds(r)] if responses >= 2 else None
    result = []
    for n in range(1, count + 1):
        share = np.array([comb(i, n - 1) / comb(count, n) for i in range(count)])
        result.append(
            BestOf(
                n=n,
                reward=float((means * share).sum(axis=1).mean()),
                crossfit_reward=None
                if folds is None
                else float(np.mean([(fold * share).sum(axis=1).mean() for fold in folds])),
                kl=log(n) - (n - 1) / n,
            )
        )
    return result


def _point(
    r: Floats, shrunk: Floats | None, untuned: Floats, kl_coef: float, seed: int
) -> FrontierPoint:
    means = r.mean(axis=2)
    weights = optimum_weights(means, kl_coef)
    objective = optimum_objective(means, kl_coef)
    point = FrontierPoint(
        kl_coef=kl_coef,
        objective=bootstrap_mean_ci(objective, seed=seed),
        gain=bootstrap_mean_ci(objective - untuned, seed=seed),
        reward=float((weights * means).sum(axis=1).mean()),
        kl=float(weights_kl(weights).mean()),
        effective_samples=float(effective_samples(weights).mean()),
    )
    if shrunk is None:
        return point
    reward, kl = crossfit(r, kl_coef)
    return replace(
        point,
        crossfit_objective=bootstrap_mean_ci(reward - kl_coef * kl, seed=seed),
        crossfit_reward=float(reward.mean()),
        crossfit_kl=float(kl.mean()),
        corrected_objective=bootstrap_mean_ci(corrected_objective(shrunk, kl_coef), seed=seed),
    )


def _folds(r: Floats) -> list[tuple[Floats, Floats]]:
    """For each response: (mean of the other responses, this one), both [P, N]."""
    responses = r.shape[2]
    if responses < 2:
        raise ValueError(f"rewards: expected at least 2 responses to cross-fit, got {responses}")
    return [(np.delete(r, m, axis=2).mean(axis=2), r[:, :, m]) for m in range(responses)]


def _ranked(chosen: Floats, judged: Floats) -> Floats:
    """``judged`` [P, N] in the rising order of ``chosen``; what is tied there is averaged, since a
    tie is broken by chance."""
    ordered = np.empty_like(judged)
    for p in range(len(chosen)):
        order = np.argsort(chosen[p], kind="stable")
        _, group = np.unique(chosen[p][order], return_inverse=True)
        values = judged[p][order]
        ordered[p] = (np.bincount(group, values) / np.bincount(group))[group]
    return ordered
