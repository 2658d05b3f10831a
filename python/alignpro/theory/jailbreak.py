"""How likely a jailbreak is, by counting: volumes in the simplex of a model's explanations.

A prompt's answer is one of ``explanations``, of which ``harmful`` are harmful; the model's
distribution over them is a point of the simplex, taken as uniform there. The *harmful zone* holds
the points whose harmful answers have a probability of ``threshold`` or more, and an adversary may
move a point by ``epsilon`` in total (l1). Su, Kempe and Ullrich 2024 (arXiv 2408.01420), Theorem 2,
whose normal approximation is no lower bound for few explanations: the binomial tail behind it is
exact, and is what stands here. Theory alone: of a real model neither the uniform point nor
``gamma`` can be measured.
"""

from __future__ import annotations

import math

from alignpro.statistics import binomial_at_most


def harmful_volume(explanations: int, harmful: int, threshold: float) -> float:
    """The share of the simplex that the harmful zone takes, in [0, 1].

    The harmful answers' probability is Beta(harmful, explanations - harmful), so the share is
    P(Binomial(explanations - 1, threshold) <= harmful - 1).

    Raises ValueError unless 1 <= harmful < explanations and 0 <= threshold <= 1.
    """
    if not 1 <= harmful < explanations:
        raise ValueError(
            f"harmful: expected at least 1 and below explanations ({explanations}), got {harmful}"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a probability, got {threshold}")
    return binomial_at_most(harmful - 1, explanations - 1, threshold)


def expanded_volume(explanations: int, harmful: int, threshold: float, epsilon: float) -> float:
    """The share from which ``epsilon`` (l1) is enough to reach the zone: half of it moves from the
    other answers to the harmful ones. Raises ValueError as `harmful_volume`, and for epsilon < 0.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected at least 0, got {epsilon}")
    harmful_volume(explanations, harmful, threshold)  # its checks
    return harmful_volume(explanations, harmful, max(0.0, threshold - epsilon / 2))


def jailbreak_bound(
    explanations: int, harmful: int, threshold: float, epsilon: float, gamma: float = 1.0
) -> float:
    """The least probability that an adversary finds a jailbreak: 1 - gamma (1 - expanded volume).

    gamma: how much more often than a uniform one the model's point lies outside of the zone, at
    least 0; 1 is the uniform point itself. 0 where the bound says nothing.
    """
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: expected a number of at least 0, got {gamma}")
    return max(
        0.0, 1.0 - gamma * (1.0 - expanded_volume(explanations, harmful, threshold, epsilon))
    )
