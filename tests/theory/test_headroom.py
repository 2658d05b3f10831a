"""The claims of theory.headroom, against truths known in closed form or by enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from alignpro.theory.headroom import (
    best_of_n,
    corrected_objective,
    crossfit,
    headroom,
    recommended_kl_coef,
)
from alignpro.theory.optimum import optimum_objective, optimum_weights, shrunk_rewards

BETWEEN, WITHIN = 0.2, 0.4  # deviations


def gaussian(prompts, n, m, *, within=WITHIN, seed=0):
    """Rewards [P, N, M] with kl_coef log Z = BETWEEN^2 / (2 kl_coef) for every prompt."""
    draw = np.random.default_rng(seed)
    true = BETWEEN * draw.normal(size=(prompts, n, 1))
    return true + within * draw.normal(size=(prompts, n, m))


def truth(kl_coef):
    return BETWEEN**2 / (2 * kl_coef)


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("kl_coef", [0.2, 0.4, 1.0])
def test_noise_biases_the_plain_estimate_high(kl_coef):
    rewards = gaussian(2000, 64, 2)
    plain = optimum_objective(rewards.mean(axis=2), kl_coef)
    # Of Gaussian noise: (between + within / M) / (2 kl_coef), of which N = 64 shows most.
    assert plain.mean() > truth(kl_coef) + 10 * standard_error(plain)
    assert plain.mean() == pytest.approx((BETWEEN**2 + WITHIN**2 / 2) / (2 * kl_coef), rel=0.1)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_finite_n_biases_it_low(n):
    kl_coef = 0.3
    rewards = gaussian(20_000, n, 1, within=0.0)
    plain = optimum_objective(rewards[:, :, 0], kl_coef)
    assert plain.mean() < truth(kl_coef) - 10 * standard_error(plain)
    # The docstring's size of it, with the effective share exp(-(deviation / kl_coef)^2).
    bias = kl_coef / (2 * n) * (math.exp((BETWEEN / kl_coef) ** 2) - 1)
    assert truth(kl_coef) - plain.mean() == pytest.approx(bias, rel=0.2)


@pytest.mark.parametrize("kl_coef", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (8, 2), (8, 4), (32, 8)])
def test_crossfitting_never_promises_too_much(n, m, kl_coef):
    reward, kl = crossfit(gaussian(4000, n, m), kl_coef)
    objective = reward - kl_coef * kl
    assert objective.mean() < truth(kl_coef) + 3 * standard_error(objective)


def test_crossfitting_nears_the_truth_with_more_samples():
    values = []
    for n, m in ((4, 2), (8, 8), (64, 64)):
        reward, kl = crossfit(gaussian(500, n, m), 0.3)
        values.append((reward - 0.3 * kl).mean())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(truth(0.3), rel=0.1)


@pytest.mark.parametrize("kl_coef", [0.2, 0.4, 1.0])
@pytest.mark.parametrize(("n", "m"), [(8, 2), (8, 4), (16, 4)])
def test_the_corrected_estimate_is_near_where_samples_support_it(n, m, kl_coef):
    """Within 4% of kl_coef, where plain and cross-fitted stand apart by up to half of it."""
    rewards = gaussian(4000, n, m)
    corrected = corrected_objective(shrunk_rewards(rewards), kl_coef)
    assert corrected.mean() == pytest.approx(truth(kl_coef), abs=0.04 * kl_coef)
    reward, kl = crossfit(rewards, kl_coef)
    plain = optimum_objective(rewards.mean(axis=2), kl_coef)
    assert (reward - kl_coef * kl).mean() < corrected.mean() < plain.mean()


def test_crossfitting_by_enumeration():
    """Two rewrites of known probability, Bernoulli rewards, N = M = 2: every outcome with its
    probability. The estimate's reward is that of the policy it describes, and its objective is
    below kl_coef log Z though the KL is that of the weights, not of the policy's marginal."""
    rho, chance, kl_coef = (0.7, 0.3), (0.2, 0.9), 0.25
    estimate_reward = estimate_objective = 0.0
    policy = [0.0, 0.0]  # the marginal of the rewrite that is kept
    for pair in itertools.product((0, 1), repeat=2):
        for outcome in itertools.product((0, 1), repeat=4):
            y = np.array(outcome, float).reshape(2, 2)
            p = math.prod(rho[x] for x in pair) * math.prod(
                chance[x] if v else 1 - chance[x]
                for x, row in zip(pair, y, strict=True)
                for v in row
            )
            reward, kl = crossfit(np.stack([y, y]), kl_coef)  # two prompts alike
            estimate_reward += p * reward[0]
            estimate_objective += p * (reward[0] - kl_coef * kl[0])
            for x, w in zip(pair, optimum_weights(y[:, 0], kl_coef), strict=True):
                policy[x] += p * w
    assert sum(policy) == pytest.approx(1)
    assert estimate_reward == pytest.approx(sum(p * c for p, c in zip(policy, chance, strict=True)))
    kl = sum(p * math.log(p / q) for p, q in zip(policy, rho, strict=True))
    best = kl_coef * math.log(
        sum(q * math.exp(c / kl_coef) for q, c in zip(rho, chance, strict=True))
    )
    value = estimate_reward - kl_coef * kl
    assert estimate_objective <= value <= best
    assert value - estimate_objective > 0.01 and best - value > 0.01


def test_discrete_rewrites_are_bracketed():
    """Five rewrites with probabilities, so that samples repeat: plain above, cross-fitted below."""
    draw = np.random.default_rng(3)
    rho = draw.dirichlet(np.ones(5))
    chance = draw.uniform(0.1, 0.9, size=5)
    for kl_coef in (0.1, 0.3):
        exact = kl_coef * math.log(float(rho @ np.exp(chance / kl_coef)))
        rewrites = draw.choice(5, size=(3000, 32), p=rho)
        rewards = (draw.random((3000, 32, 3)) < chance[rewrites][:, :, None]).astype(float)
        point = headroom(rewards, [kl_coef]).frontier[0]
        assert point.crossfit_objective.high < exact < point.objective.low
        corrected = point.corrected_objective.mean
        assert point.crossfit_objective.mean < corrected < point.objective.mean
    # A coin's noise is not Gaussian: the correction is right to second order in 1 / kl_coef.
    assert corrected == pytest.approx(exact, abs=0.1 * kl_coef)


def test_the_report_adds_up():
    rewards = gaussian(30, 6, 3) + np.linspace(0, 1, 30)[:, None, None]
    result = headroom(rewards, [1.0, 0.1, 0.5, 0.1])
    assert (result.num_prompts, result.num_rewrites, result.num_responses) == (30, 6, 3)
    assert [point.kl_coef for point in result.frontier] == [0.1, 0.5, 1.0]
    assert result.untuned.mean == pytest.approx(rewards.mean())
    for point in result.frontier:
        assert point.objective.mean == pytest.approx(point.reward - point.kl_coef * point.kl)
        assert point.gain.mean == pytest.approx(point.objective.mean - result.untuned.mean)
        # Paired: what the prompts have in common is gone from it.
        assert point.gain.high - point.gain.low < point.objective.high - point.objective.low
        assert point.crossfit_objective.mean == pytest.approx(
            point.crossfit_reward - point.kl_coef * point.crossfit_kl
        )
        assert 0 <= point.kl <= math.log(6) and 1 <= point.effective_samples <= 6
        assert result.untuned.mean <= point.objective.mean
    assert [p.reward for p in result.frontier] == sorted(
        (p.reward for p in result.frontier), reverse=True
    )


def test_one_response_leaves_out_what_needs_two():
    result = headroom(gaussian(5, 4, 1), [0.3])
    point = result.frontier[0]
    assert point.crossfit_objective is point.corrected_objective is point.crossfit_kl is None
    assert result.variance is None
    assert all(best.crossfit_reward is None for best in result.best_of_n)


def test_recommended_is_the_smallest_supported():
    rewards = gaussian(40, 9, 2)
    grid = [0.01, 0.1, 0.3, 1.0, 3.0]
    result = headroom(rewards, grid)
    enough = [p.kl_coef for p in result.frontier if p.effective_samples >= 3]
    assert 0.01 not in enough and 3.0 in enough
    assert result.recommended_kl_coef == min(enough)
    assert headroom(rewards, [0.001]).recommended_kl_coef is None
    assert recommended_kl_coef([], 9) is None


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = np.random.default_rng(4).integers(0, 3, size=(3, 5, 2)).astype(float)  # with ties
    means = rewards.mean(axis=2)
    result = best_of_n(rewards)
    for best in result:
        subsets = list(itertools.combinations(range(5), best.n))
        largest = np.mean([means[:, list(s)].max(axis=1) for s in subsets])
        assert best.reward == pytest.approx(largest)
        crossed = []
        for m in (0, 1):
            chosen, judged = rewards[:, :, 1 - m], rewards[:, :, m]
            for p, s in itertools.product(range(3), subsets):
                top = [i for i in s if chosen[p, i] == chosen[p, list(s)].max()]
                crossed.append(judged[p, top].mean())
        assert best.crossfit_reward == pytest.approx(np.mean(crossed))
        assert best.kl == pytest.approx(math.log(best.n) - (best.n - 1) / best.n)
    assert result[0].reward == pytest.approx(rewards.mean()) and result[0].kl == 0


@pytest.mark.parametrize(
    ("rewards", "grid", "message"),
    [
        (np.zeros((1, 4, 2)), [0.1], "prompts >= 2"),
        (np.zeros((4, 1, 2)), [0.1], "rewrites >= 2"),
        (np.zeros((4, 2, 2)), [], "kl_coefs: expected at least one"),
        (np.zeros((4, 2, 2)), [0.1, -1.0], "above 0, got -1.0"),
    ],
)
def test_bad_input(rewards, grid, message):
    with pytest.raises(ValueError, match=message):
        headroom(rewards, grid)
    with pytest.raises(ValueError, match="at least 2 responses to cross-fit, got 1"):
        crossfit(np.zeros((2, 2, 1)), 0.1)
