"""Weights, objective and KL of the optimum on samples, by hand; noise taken out of rewards."""

from __future__ import annotations

import numpy as np
import pytest

from alignpro.statistics import law_of_total_variance
from alignpro.theory.optimum import (
    effective_samples,
    optimum_objective,
    optimum_weights,
    shrunk_rewards,
    weights_kl,
)


def test_by_hand():
    # exp(R / 0.5) = 1, 3: weights 1/4, 3/4; the mean of the exponentials is 2.
    rewards = np.array([0.0, 0.5 * np.log(3)])
    weights = optimum_weights(rewards, 0.5)
    assert weights == pytest.approx([0.25, 0.75])
    assert optimum_objective(rewards, 0.5) == pytest.approx(0.5 * np.log(2))
    assert weights_kl(weights) == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert effective_samples(weights) == pytest.approx(1 / (1 / 16 + 9 / 16))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("kl_coef", [1e-3, 0.1, 1e3])
def test_the_objective_is_reward_less_kl(kl_coef, offset):
    rewards = offset + np.random.default_rng(0).normal(size=(3, 5, 7))
    weights = optimum_weights(rewards, kl_coef)
    assert weights.sum(axis=-1) == pytest.approx(1)
    value = (weights * rewards).sum(axis=-1) - kl_coef * weights_kl(weights)
    assert optimum_objective(rewards, kl_coef) == pytest.approx(value, abs=1e-9 * kl_coef + 1e-9)
    assert weights_kl(weights).max() <= np.log(7) + 1e-12 and weights_kl(weights).min() >= -1e-12


def test_a_large_kl_coef_is_the_untuned_prompter_and_a_small_one_the_best_sample():
    rewards = np.random.default_rng(1).normal(size=(4, 6))
    assert optimum_weights(rewards, 1e9) == pytest.approx(np.full((4, 6), 1 / 6))
    assert optimum_objective(rewards, 1e9) == pytest.approx(rewards.mean(axis=1), abs=1e-8)
    loose = optimum_weights(rewards, 1e-4)
    assert (loose.argmax(axis=1) == rewards.argmax(axis=1)).all()
    assert weights_kl(loose) == pytest.approx(np.log(6)) and effective_samples(
        loose
    ) == pytest.approx(1)
    assert np.isfinite(weights_kl(loose)).all()  # weights of exactly 0 among them
    for kl_coef in (1e-310, 1e-300):  # R / kl_coef is more than a float holds
        assert optimum_weights(rewards, kl_coef).max(axis=1) == pytest.approx(1)
        assert optimum_objective(rewards, kl_coef) == pytest.approx(rewards.max(axis=1))


def test_a_large_kl_coef_multiplies_no_rounding():
    rewards = np.random.default_rng(2).normal(size=(50, 6))
    second = rewards.mean(axis=1) + rewards.var(axis=1) / 2e7  # of the series in 1 / kl_coef
    assert optimum_objective(rewards, 1e7) == pytest.approx(second, abs=1e-13)


def test_shrunk_spread_is_what_lies_between_rewrites():
    draw = np.random.default_rng(2)
    true = draw.normal(scale=0.2, size=(400, 6))
    rewards = true[:, :, None] + draw.normal(scale=0.5, size=(400, 6, 3))
    shrunk = shrunk_rewards(rewards)
    between = law_of_total_variance(rewards).between_rewrites
    assert shrunk.var(axis=1, ddof=1).mean() == pytest.approx(between, rel=1e-9)
    assert shrunk.var(axis=1, ddof=1).mean() == pytest.approx(0.04, rel=0.15)  # 400 prompts
    assert shrunk.mean(axis=1) == pytest.approx(rewards.mean(axis=(1, 2)))
    noiseless = np.repeat(true[:, :, None], 3, axis=2)
    assert shrunk_rewards(noiseless) == pytest.approx(true)


def test_rewards_that_are_all_noise_become_their_prompts_mean():
    # Every rewrite has the responses 0 and 1: the means are equal, between is below 0.
    rewards = np.tile([0.0, 1.0], (3, 4, 1)) + np.arange(3.0)[:, None, None]
    assert shrunk_rewards(rewards) == pytest.approx(np.repeat([[0.5], [1.5], [2.5]], 4, axis=1))
    assert shrunk_rewards(np.ones((2, 3, 2))) == pytest.approx(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimum_weights([0.0, 1.0], 0.0), "kl_coef: expected a number above 0, got 0.0"),
        (lambda: optimum_objective([0.0], float("nan")), "kl_coef: expected a number above 0"),
        (lambda: optimum_weights([0.0, np.inf], 1.0), "rewards: expected finite numbers"),
        (lambda: optimum_weights([], 1.0), "at least one sample"),
        (
            lambda: shrunk_rewards(np.zeros((2, 3))),
            r"expected \[prompts >= 2, .* got shape \[2, 3\]",
        ),
        (lambda: shrunk_rewards(np.zeros((2, 3, 1))), "responses >= 2"),
        (lambda: shrunk_rewards(np.full((2, 3, 2), np.nan)), "expected finite numbers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
