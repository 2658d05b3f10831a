"""A reward of several parts before any training, where its optima are known; how samples err."""

from __future__ import annotations

import numpy as np
import pytest

from alignpro.theory.goals import forecast_goals
from alignpro.theory.mixture import weights_of_rewards

# Four outcomes that the reference writes with (.4, .3, .2, .1), each as often as that in 10 draws.
REWARDS = np.repeat([[1.0, 0.0], [0.0, 1.0], [0.2, 0.6], [0.4, 0.1]], [4, 3, 2, 1], axis=0)
BETA = 0.5


def forecast(weights=(0.5, 0.5), responses=1, sign=1.0):
    """Two prompts alike."""
    parts = {
        name: np.tile(part[None, :, None], (2, 1, responses))
        for name, part in (("first", REWARDS[:, 0]), ("second", sign * REWARDS[:, 1]))
    }
    return forecast_goals(parts, dict(zip(parts, weights, strict=True)), BETA)


def test_max_min_of_normalized_rewards():
    found = weights_of_rewards(REWARDS[None], BETA)
    assert found.weights == pytest.approx([0.496883, 0.503117], abs=5e-7)
    assert found.implicit == pytest.approx([-0.1725, -0.1725], abs=5e-5)
    assert BETA * found.value == pytest.approx(-0.177671, abs=5e-7)
    assert found.kl == pytest.approx(0.0103, abs=5e-5) and found.kkt_gap < 1e-8


def test_max_min_of_rewards_as_they_are():
    found = weights_of_rewards(REWARDS[None], BETA, normalized=False)
    assert found.weights == pytest.approx([0.463855, 0.536145], abs=5e-7)
    assert found.implicit == pytest.approx([0.465644, 0.465644], abs=5e-7)
    assert BETA * found.value == pytest.approx(0.465644 - BETA * found.kl, abs=5e-7)


@pytest.mark.parametrize("responses", [1, 3])  # responses that agree have no noise to take out
def test_a_forecast(responses):
    found = forecast(responses=responses)
    first, second = found.goals.values()
    assert (first.untuned, second.untuned) == pytest.approx((0.48, 0.43))
    assert (first.maxmin_reward, second.maxmin_reward) == pytest.approx((0.4919, 0.4398), abs=5e-5)
    assert first.maxmin_normalized == pytest.approx(-0.1725, abs=5e-5)
    assert first.raw_maxmin_reward == pytest.approx(0.465644, abs=5e-7)
    assert second.raw_maxmin_reward == pytest.approx(0.465644, abs=5e-7)
    assert found.maxmin.value == pytest.approx(-0.177671, abs=5e-7)
    mass = np.array([0.4, 0.3, 0.2, 0.1]) * np.exp(np.array([1.0, 0.0, 0.2, 0.4]) / BETA)
    alone = mass @ [1.0, 0.0, 0.2, 0.4] / mass.sum()
    assert first.alone == pytest.approx(alone)
    # By equal weights nearly that of the max-min ones, and less than alone.
    assert first.reward == pytest.approx(first.maxmin_reward, abs=0.01) and first.reward < alone
    assert found.effective_samples > 9 and found.num_prompts == 2


def test_who_is_worst_off_goes_by_the_weights_given():
    assert forecast((1.0, 0.1)).worst == "second" and forecast((0.1, 1.0)).worst == "first"
    first, second = forecast((1.0, 1e-6)).goals.values()  # all but the first alone
    # Its own goal is above kl_coef log Z by kl_coef times its KL.
    assert second.normalized - first.normalized == pytest.approx(-0.6372, abs=5e-5)


def test_a_weight_below_0_is_a_goal_to_keep_low():
    found, mirrored = forecast(), forecast((0.5, -0.5), sign=-1.0)
    assert mirrored.goals["second"].maxmin_reward == pytest.approx(
        -found.goals["second"].maxmin_reward
    )
    assert mirrored.maxmin == found.maxmin and mirrored.worst == found.worst


def test_how_few_samples_err():
    """Gaussian rewards of deviations 1 and 0.5 at kl_coef 1, correlated by -0.5: lambda* is a half,
    the normalized value -Var(R_1 - R_2) / 8; each claim of `weights_of_rewards`."""
    covariance = np.array([[1.0, -0.25], [-0.25, 0.25]])
    rewards = np.random.default_rng(0).multivariate_normal([0, 0], covariance, size=(4000, 64))
    value = {s: weights_of_rewards(rewards[:, :s], 1.0) for s in (1, 4, 64)}
    raw = {s: weights_of_rewards(rewards[:, :s], 1.0, normalized=False) for s in (2, 64)}
    assert value[64].value == pytest.approx(-1.75 / 8, abs=0.01)
    assert value[64].weights[0] == pytest.approx(0.5, abs=0.02)
    assert value[1].value == pytest.approx(0.0, abs=1e-12)
    assert value[1].value > value[4].value > value[64].value
    # 0.481, with a deviation of 0.001 over draws of the prompts.
    assert value[4].weights[0] < 0.49
    assert raw[2].value < raw[64].value


@pytest.mark.parametrize(
    ("rewards", "kl_coef", "message"),
    [
        (REWARDS[None], 0.0, "kl_coef: expected a number above 0"),
        (REWARDS, 1.0, "rewards: expected finite numbers"),
        (REWARDS[None, :, :1], 1.0, "2 or more goals"),
        (REWARDS[None] * np.nan, 1.0, "rewards: expected finite numbers"),
    ],
)
def test_refused(rewards, kl_coef, message):
    with pytest.raises(ValueError, match=message):
        weights_of_rewards(rewards, kl_coef)
