"""The controller of kl_coef."""

from __future__ import annotations

import math

import pytest

from alignpro.objective import AdaptiveKLController


def test_by_hand():
    assert AdaptiveKLController(2.0).update(0.05, 2.0) == 0.05
    assert AdaptiveKLController(2.0, gain=0.5).update(0.05, 2.2) == pytest.approx(
        0.05 * math.exp(0.05)
    )
    assert AdaptiveKLController(2.0, gain=0.5).update(0.05, 1.8) == pytest.approx(
        0.05 * math.exp(-0.05)
    )


def test_one_odd_batch_moves_it_little():
    assert AdaptiveKLController(2.0).update(1.0, 1e6) == pytest.approx(math.exp(0.02))
    assert AdaptiveKLController(2.0).update(1.0, 0.0) == pytest.approx(math.exp(-0.02))


def test_it_settles_where_the_kl_is_the_target():
    # A policy whose KL falls with the square of kl_coef.
    kl_coef, controller = 3.0, AdaptiveKLController(4.0, gain=0.5)
    for _ in range(300):
        kl_coef = controller.update(kl_coef, 1.0 / kl_coef**2)
    assert kl_coef == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("kl_coef", "kl", "target", "gain", "says"),
    [
        (0.0, 1.0, 1.0, 0.1, "kl_coef"),
        (1.0, 1.0, 0.0, 0.1, "target"),
        (1.0, 1.0, 1.0, math.inf, "gain"),
        (1.0, math.nan, 1.0, 0.1, "kl"),
    ],
)
def test_bad_numbers_are_named(kl_coef, kl, target, gain, says):
    with pytest.raises(ValueError, match=rf"^{says}: expected a finite number"):
        AdaptiveKLController(target, gain).update(kl_coef, kl)
