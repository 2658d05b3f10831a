"""A reward of several parts, before any training: which part will be worst off, and the weights
that serve the worst-off one best (`theory.mixture`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import Floats
from alignpro.theory.mixture import MixtureWeights, weights_of_rewards
from alignpro.theory.optimum import (
    effective_samples,
    optimum_objective,
    optimum_weights,
    shrunk_rewards,
)


@dataclass(frozen=True)
class GoalForecast:
    """A part of the reward, unweighted; a part with a weight below 0 is a goal to keep low."""

    weight: float  # as given
    untuned: float  # its mean reward
    alone: float  # where it is all that is trained for
    reward: float  # of the optimum for the weighted sum as given
    normalized: float  # the same less kl_coef log Z of the goal alone, which makes goals comparable
    maxmin_weight: float  # lambda*, of goals normalized
    maxmin_reward: float
    maxmin_normalized: float
    raw_maxmin_weight: float  # lambda*, of rewards as they are
    raw_maxmin_reward: float


@dataclass(frozen=True)
class MaxMin:
    """What the max-min weights reach."""

    value: float  # the least goal less kl_coef times the KL
    kkt_gap: float
    kl: float  # nats
    effective_samples: float


@dataclass(frozen=True)
class GoalsForecast:
    kl_coef: float
    goals: dict[str, GoalForecast]
    worst: str  # the goal that is least, normalized, under the weights as given
    effective_samples: float  # of the optimum for the weighted sum
    maxmin: MaxMin
    raw_maxmin: MaxMin
    num_prompts: int


def forecast_goals(
    parts: Mapping[str, ArrayLike], weights: Mapping[str, float], kl_coef: float
) -> GoalsForecast:
    """From rewards [P, N, M] of every part (P and N >= 2), of rewrites that the untuned prompter
    wrote. weights: by part, none of them 0. With two or more responses the parts' spread is freed
    of the responses' noise (`shrunk_rewards`).

    Raises ValueError for fewer than two parts, and as `weights_of_rewards`.
    """
    names = list(parts)
    given = np.array([weights[name] for name in names])
    sign = np.sign(given)
    means = np.stack([_denoised(np.asarray(parts[name], float)) for name in names], axis=2)
    goals = means * sign
    chosen = optimum_weights(means @ given, kl_coef)
    reached = _reached(means, chosen)
    alone = [
        _reached(means[..., k], optimum_weights(goals[..., k], kl_coef)) for k in range(len(names))
    ]
    normalized = sign * reached - optimum_objective(goals.swapaxes(1, 2), kl_coef).mean(axis=0)
    found = [weights_of_rewards(goals, kl_coef, normalized=of) for of in (True, False)]
    by_maxmin, by_raw = (
        _reached(means, optimum_weights(goals @ one.weights, kl_coef)) for one in found
    )
    return GoalsForecast(
        kl_coef=kl_coef,
        goals={
            name: GoalForecast(
                weight=float(given[k]),
                untuned=float(means[..., k].mean()),
                alone=float(alone[k]),
                reward=float(reached[k]),
                normalized=float(normalized[k]),
                maxmin_weight=float(found[0].weights[k]),
                maxmin_reward=float(by_maxmin[k]),
                maxmin_normalized=float(found[0].implicit[k]),
                raw_maxmin_weight=float(found[1].weights[k]),
                raw_maxmin_reward=float(by_raw[k]),
            )
            for k, name in enumerate(names)
        },
        worst=names[int(np.argmin(normalized))],
        effective_samples=float(effective_samples(chosen).mean()),
        maxmin=_summary(found[0], kl_coef),
        raw_maxmin=_summary(found[1], kl_coef),
        num_prompts=len(means),
    )


def _denoised(rewards: Floats) -> Floats:
    """[P, N] of [P, N, M]."""
    return shrunk_rewards(rewards) if rewards.shape[2] > 1 else rewards[..., 0]


def _reached(means: Floats, weights: Floats) -> Floats:
    """[...] of means [P, N, ...] under weights [P, N]: the mean over prompts."""
    reached: Floats = np.einsum("pn,pn...->...", weights, means) / len(means)
    return reached


def _summary(found: MixtureWeights, kl_coef: float) -> MaxMin:
    return MaxMin(kl_coef * found.value, found.kkt_gap, found.kl, found.effective_samples)
