"""Self-rewarding with a calibrator: scores of candidates, and where rounds of it lead.

A candidate has a self-reward (how likely the policy finds it) and a calibrator's reward (how
faithful it is); ``calibration`` is the calibrator's share. Zhou et al. 2024 (CSR, arXiv 2405.14622)
add the two as they are, R = lambda R_I + (1 - lambda) R_T, where R_I goes to 100 and R_T is a
probability, so that from lambda 0.01 on R is the calibrator; their code adds ranks.

With a fixed reward r and the policy before as reference, a round multiplies the policy by
exp(r / beta): after T rounds it is pi_0 exp(T r / beta), so the weight of the KL penalty to the
*first* policy is beta / T. The self-reward log pi is not fixed: a round raises the policy to the
power 1 + (1 - lambda) / beta, which collapses it onto what it found likely at first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import Floats

Scale = Literal["rank", "z", "raw"]
MovingReference = Literal["previous", "first"]


def ranks(values: ArrayLike) -> Floats:
    """rank / K over the last axis [..., K]: 1/K of the largest, 1 of the smallest; equal values
    share the mean of their ranks."""
    v = _finite("values", values)
    above = (v[..., None, :] > v[..., :, None]).sum(axis=-1)
    equal = (v[..., None, :] == v[..., :, None]).sum(axis=-1)
    shares: Floats = (above + (equal + 1) / 2) / v.shape[-1]
    return shares


def calibrated_scores(
    confidence: ArrayLike, calibrator: ArrayLike, calibration: float, scale: Scale
) -> Floats:
    """Scores [..., K] of the candidates of one place, higher for a better one.

    Args:
        confidence, calibrator: the two rewards [..., K].
        calibration: the calibrator's share, lambda.
        scale: "rank" is minus the weighted `ranks`, as the code of CSR has it; "z" weights the two
            less their mean, over their deviation (0 where all are equal); "raw" as they are.

    Raises ValueError for shapes that differ, numbers that are not finite, or a share outside of
    [0, 1].
    """
    own, other = _finite("confidence", confidence), _finite("calibrator", calibrator)
    if own.shape != other.shape:
        raise ValueError(f"calibrator: expected the shape {own.shape}, got {other.shape}")
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration: expected a share from 0 to 1, got {calibration}")
    if scale == "rank":
        own, other = -ranks(own), -ranks(other)
    elif scale == "z":
        own, other = _standardised(own), _standardised(other)
    scores: Floats = calibration * other + (1 - calibration) * own
    return scores


def calibrator_decides(calibration: float, candidates: int) -> bool:
    """Whether ranks of so many candidates, or fewer, are in the calibrator's order whatever the
    confidence says, but where the calibrator calls two equal.

    [derived] One rank of the calibrator is worth lambda / K, all of the confidence's together
    (1 - lambda) (K - 1) / K: it decides from lambda > (K - 1) / K on, which is 0.8 of five.
    """
    return calibration > (candidates - 1) / candidates


def effective_beta(beta: float, rounds: int, reference: MovingReference) -> float:
    """The weight of the KL penalty to the *first* policy that ``rounds`` of a fixed reward amount
    to: beta over their number where each is held to the one before."""
    return beta / max(1, rounds) if reference == "previous" else beta


def sharpening(calibration: float, beta: float, rounds: int, reference: MovingReference) -> float:
    """The power that the first policy is raised to by ``rounds`` of the self-reward log pi with the
    weight 1 - calibration; 1 is none, and as it grows the policy collapses onto its mode."""
    step, power = (1 - calibration) / beta, 1.0
    for _ in range(rounds):
        power = power * (1 + step) if reference == "previous" else 1 + step * power
    return power


def _standardised(values: Floats) -> Floats:
    centred = values - values.mean(axis=-1, keepdims=True)
    deviation = centred.std(axis=-1, keepdims=True)
    scaled: Floats = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return scaled


def _finite(name: str, values: ArrayLike) -> Floats:
    v = np.asarray(values, np.float64)
    if v.ndim < 1 or v.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one, got shape {list(v.shape)}")
    if not np.isfinite(v).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return v
