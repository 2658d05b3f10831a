"""The controller of kl_coef."""

from __future__ import annotations

import math

import pytest

from alignpro.objective import steer_kl_coef


def test_by_hand():
    assert steer_kl_coef(0.05, 2.0, 2.0, 0.1) == 0.05
    assert steer_kl_coef(0.05, 2.2, 2.0, 0.5) == pytest.approx(0.05 * math.exp(0.05))
    assert steer_kl_coef(0.05, 1.8, 2.0, 0.5) == pytest.approx(0.05 * math.exp(-0.05))


def test_one_odd_batch_moves_it_little():
    assert steer_kl_coef(1.0, 1e6, 2.0, 0.1) == pytest.approx(math.exp(0.02))
    assert steer_kl_coef(1.0, 0.0, 2.0, 0.1) == pytest.approx(math.exp(-0.02))


def test_it_settles_where_the_kl_is_the_target():
    # A policy whose KL falls with the square of kl_coef.
    kl_coef = 3.0
    for _ in range(300):
        kl_coef = steer_kl_coef(kl_coef, 1.0 / kl_coef**2, 4.0, 0.5)
    assert kl_coef == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.0, 1.0, 1.0, 0.1), "kl_coef"),
        ((1.0, 1.0, 0.0, 0.1), "target"),
        ((1.0, 1.0, 1.0, math.inf), "gain"),
        ((1.0, math.nan, 1.0, 0.1), "kl"),
    ],
)
def test_bad_numbers_are_named(arguments, says):
    with pytest.raises(ValueError, match=rf"^{says}: expected a finite number"):
        steer_kl_coef(*arguments)
