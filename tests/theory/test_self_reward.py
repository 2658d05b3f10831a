"""Self-rewarding in closed form: numbers by hand, and rounds iterated against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.theory.self_reward import (
    calibrated_scores,
    calibrator_decides,
    effective_beta,
    ranks,
    sharpening,
)

FIRST = np.array([0.5, 0.3, 0.2])
GROUNDING = np.array([0.0, 0.2, 0.6])


def tilted(policy, rewards, beta):
    """The optimum of the expected reward less beta KL(. || policy)."""
    mass = policy * np.exp(rewards / beta)
    return mass / mass.sum()


def rounds(calibration, reference="previous", beta=1.0, count=3):
    """The policy after rounds of lambda G + (1 - lambda) log pi, each the optimum of its own."""
    policy = FIRST
    for _ in range(count):
        rewards = calibration * GROUNDING + (1 - calibration) * np.log(policy)
        policy = tilted(policy if reference == "previous" else FIRST, rewards, beta)
    return policy


def entropy(policy):
    return -float((policy * np.log(policy)).sum())


def test_the_papers_formula_is_the_calibrator_at_any_share():
    own, other = math.prod((0.5, 0.8, 0.25)), 100 * 0.3
    assert (own, other) == (pytest.approx(0.1), 30.0)
    for share, expected in ((0.1, 3.09), (0.5, 15.05), (0.9, 27.01)):
        (score,) = calibrated_scores([own], [other], share, "raw")
        assert score == pytest.approx(expected, abs=1e-12)
    assert other / own == pytest.approx(300)


def test_ranks_decide_by_both():
    own, other = (-0.2, -0.5, -0.9), (20.0, 25.0, 22.0)
    assert ranks(own) == pytest.approx([1 / 3, 2 / 3, 1])
    assert ranks(other) == pytest.approx([1, 1 / 3, 2 / 3])
    for share, costs in (
        (0.9, [0.9333333, 0.3666667, 0.7]),
        (0.0, [1 / 3, 2 / 3, 1]),
        (1.0, [1, 1 / 3, 2 / 3]),
    ):
        scores = calibrated_scores(own, other, share, "rank")
        assert -scores == pytest.approx(costs, abs=1e-7)
    chosen = calibrated_scores(own, other, 0.9, "rank")
    assert (chosen.argmax(), chosen.argmin()) == (1, 0)
    assert calibrated_scores(own, other, 0.0, "rank").argmax() == 0


def test_equal_values_share_their_ranks_and_a_deviation_of_0_says_nothing():
    assert ranks([2.0, 1.0, 2.0, 0.0]) == pytest.approx([1.5 / 4, 3 / 4, 1.5 / 4, 1])
    z = calibrated_scores([1.0, 1.0, 1.0], [0.0, 3.0, 6.0], 0.5, "z")
    assert z == pytest.approx([-math.sqrt(1.5) / 2, 0, math.sqrt(1.5) / 2])
    batch = calibrated_scores([[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], 0.5, "rank")
    assert batch == pytest.approx(np.array([[-1, -0.5], [-0.75, -0.75]]))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_from_which_share_on_the_calibrator_alone_decides(count):
    """Against the confidence that contradicts it most, of neighbours in its own order."""
    other = np.arange(count, dtype=float)[::-1]
    own = np.arange(count, dtype=float)
    own[0], own[1] = -1.0, count  # the second is the most confident, the first the least
    border = (count - 1) / count
    for share, decides in ((border + 1e-6, True), (border - 1e-6, False)):
        scores = calibrated_scores(own, other, share, "rank")
        assert (scores[0] > scores[1]) == decides == calibrator_decides(share, count)
    assert calibrator_decides(0.9, 5) and not calibrator_decides(0.8, 5)


def test_a_moving_reference_loosens_the_penalty():
    policy = FIRST
    for _ in range(3):
        policy = tilted(policy, GROUNDING, 1.0)
    assert policy == pytest.approx([0.221576, 0.242242, 0.536182], abs=5e-7)
    beta = effective_beta(1.0, 3, "previous")
    assert policy == pytest.approx(tilted(FIRST, GROUNDING, beta), abs=1e-12)
    assert beta == pytest.approx(1 / 3) and effective_beta(1.0, 3, "first") == 1.0


@pytest.mark.parametrize(
    ("calibration", "expected", "spread", "grounding"),
    [
        (0.0, (0.982848, 0.016508, 0.000644), 0.0895, 0.0037),
        (0.5, (0.677735, 0.194362, 0.127903), None, 0.1156),
        (0.9, (0.271463, 0.249564, 0.478972), 1.0530, 0.3373),
        (1.0, None, None, 0.3702),
    ],
)
def test_self_rewarding_collapses_on_the_prior_unless_calibrated(
    calibration, expected, spread, grounding
):
    assert entropy(FIRST) == pytest.approx(1.0297, abs=5e-5)
    policy = rounds(calibration)
    if expected is not None:
        assert policy == pytest.approx(expected, abs=5e-7)
    if spread is not None:
        assert entropy(policy) == pytest.approx(spread, abs=5e-5)
    assert float(policy @ GROUNDING) == pytest.approx(grounding, abs=5e-5)


@pytest.mark.parametrize("reference", ["previous", "first"])
@pytest.mark.parametrize("calibration", [0.0, 0.5, 0.9])
def test_the_power_of_the_first_policy(calibration, reference):
    """Of the self-reward alone: a calibrator that is the same everywhere changes nothing."""
    policy = FIRST
    for _ in range(3):
        rewards = (1 - calibration) * np.log(policy)
        policy = tilted(policy if reference == "previous" else FIRST, rewards, 0.7)
    power = sharpening(calibration, 0.7, 3, reference)
    assert policy == pytest.approx(FIRST**power / (FIRST**power).sum(), abs=1e-12)
    assert sharpening(1.0, 0.7, 3, reference) == 1.0


def test_what_is_refused():
    with pytest.raises(ValueError, match="calibration: expected a share"):
        calibrated_scores([0.0], [0.0], 1.1, "rank")
    with pytest.raises(ValueError, match=r"calibrator: expected the shape \(1,\), got \(2,\)"):
        calibrated_scores([0.0], [0.0, 1.0], 0.5, "z")
    with pytest.raises(ValueError, match="confidence: expected finite numbers"):
        calibrated_scores([math.nan], [0.0], 0.5, "raw")
