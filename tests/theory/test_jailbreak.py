"""Volumes of the simplex: known values, the simplex itself, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from alignpro.theory.jailbreak import expanded_volume, harmful_volume, jailbreak_bound


@pytest.mark.parametrize(
    ("explanations", "harmful", "threshold", "epsilon", "volume"),
    [
        (3, 1, 0.2, 0.0, 0.64),
        (100, 5, 0.1, 0.0, 0.025404),
        (100, 5, 0.1, 0.05, 0.127716),
        (1000, 80, 0.1, 0.02, 0.123751),
        (100, 20, 0.1, 0.0, 0.998256),  # where the normal approximation says 0.998851
        (20, 4, 0.1, 0.0, 0.885002),
        (20, 4, 0.1, 0.3, 1.0),  # further than the threshold
    ],
)
def test_known_volumes(explanations, harmful, threshold, epsilon, volume):
    assert expanded_volume(explanations, harmful, threshold, epsilon) == pytest.approx(
        volume, abs=5e-7
    )


def test_the_simplex_agrees():
    points = np.random.default_rng(0).dirichlet(np.ones(20), size=40_000)
    share = (points[:, :4].sum(axis=1) >= 0.1).mean()
    assert harmful_volume(20, 4, 0.1) == pytest.approx(share, abs=0.007)  # four deviations
    # The farthest that an l1 ball of 0.06 reaches.
    share = (points[:, :4].sum(axis=1) + 0.03 >= 0.1).mean()
    assert expanded_volume(20, 4, 0.1, 0.06) == pytest.approx(share, abs=0.007)


def test_the_bound():
    volume = expanded_volume(100, 5, 0.1, 0.05)
    assert jailbreak_bound(100, 5, 0.1, 0.05) == pytest.approx(volume)
    assert jailbreak_bound(100, 5, 0.1, 0.05, gamma=0.5) == pytest.approx(0.5 + volume / 2)
    assert jailbreak_bound(100, 5, 0.1, 0.05, gamma=2.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 5, 0.1, 0.0), "harmful: expected at least 1 and below explanations"),
        ((5, 0, 0.1, 0.0), "harmful: expected at least 1"),
        ((5, 1, 1.5, 0.0), "threshold: expected a probability"),
        ((5, 1, 0.1, -1.0), "epsilon: expected at least 0"),
        ((5, 1, 0.1, 0.0, float("nan")), "gamma: expected a number"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jailbreak_bound(*arguments)
