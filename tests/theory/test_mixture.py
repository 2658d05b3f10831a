"""The best mixture, where it is known: enumerated outcomes, and samples of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.theory.mixture import balance_draws, balance_weights, maxmin_weights


def enumerated(reference, *experts):
    """[1, S, K] and [1, S]: every outcome once, as draws of a uniform proposal."""
    reference = np.log(np.asarray(reference, float))
    ratios = np.stack([np.log(np.asarray(e, float)) - reference for e in experts], axis=1)
    return ratios[None], (reference + math.log(len(reference)))[None]


def test_two_coins():
    # lambda_1 = ln(ln 5 / ln 1.8) / ln 9; the reference cancels.
    for reference in ((0.5, 0.5), (0.2, 0.8)):
        found = maxmin_weights(*enumerated(reference, (0.9, 0.1), (0.5, 0.5)))
        assert found.weights[0] == pytest.approx(0.4584312, abs=5e-8)
        assert found.value == pytest.approx(-0.1123774, abs=5e-8)
        assert found.kkt_gap < 1e-8


UNIFORM = (0.25,) * 4


def test_a_goal_that_is_served_already_has_no_weight():
    experts = ((0.7, 0.1, 0.1, 0.1), (0.1, 0.7, 0.1, 0.1), (0.3, 0.3, 0.2, 0.2))
    found = maxmin_weights(*enumerated(UNIFORM, *experts))
    assert found.weights == pytest.approx([0.5, 0.5, 0.0], abs=1e-9)
    assert found.value == pytest.approx(-0.3158754, abs=5e-8)
    # Derivatives by log(rho_k / rho_ref), the reference being uniform.
    expected = np.array([-1.5965, -1.5965, -1.3152]) + math.log(4)
    assert found.gradient == pytest.approx(expected, abs=5e-5)
    assert found.kkt_gap < 1e-8


def test_all_goals_are_active():
    experts = ((0.7, 0.1, 0.1, 0.1), (0.1, 0.6, 0.2, 0.1), (0.15, 0.15, 0.1, 0.6))
    found = maxmin_weights(*enumerated(UNIFORM, *experts))
    assert found.weights == pytest.approx([0.392898, 0.354242, 0.252860], abs=5e-7)
    assert found.value == pytest.approx(-0.3117657, abs=5e-8)
    assert found.gradient == pytest.approx([-1.670050 + math.log(4)] * 3, abs=5e-7)


REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([[1.0, 0.0, 0.2, 0.4], [0.0, 1.0, 0.6, 0.1]])


def tilted(reward, beta):
    mass = REFERENCE * np.exp(reward / beta)
    return mass / mass.sum()


def test_from_rewards():
    beta = 0.5
    experts = [tilted(reward, beta) for reward in REWARDS]
    found = maxmin_weights(*enumerated(REFERENCE, *experts), betas=[beta, beta])
    assert found.weights == pytest.approx([0.496883, 0.503117], abs=5e-7)
    assert found.implicit == pytest.approx([-0.1725, -0.1725], abs=5e-5)
    assert beta * found.value == pytest.approx(-0.177671, abs=5e-7)
    assert found.kl == pytest.approx(0.0103, abs=5e-5)


def test_goals_that_were_trained_with_other_kl_coefs():
    # The exponents tilt the reference by sum lambda_k r_k at beta, whatever each was trained with.
    betas, beta = (0.5, 1.0), 0.5
    experts = [tilted(reward, b) for reward, b in zip(REWARDS, betas, strict=True)]
    found = maxmin_weights(*enumerated(REFERENCE, *experts), betas=betas, beta=beta)
    exponents = found.exponents
    mixed = REFERENCE * np.prod(
        [(e / REFERENCE) ** x for e, x in zip(experts, exponents, strict=True)], axis=0
    )
    assert mixed / mixed.sum() == pytest.approx(tilted(found.weights @ REWARDS, beta), abs=1e-9)
    assert exponents == pytest.approx(found.weights * np.array(betas) / beta)


def test_draws_from_the_prompters_find_it_with_few():
    rng, prompts, outcomes, drawn = np.random.default_rng(0), 96, 300, 4
    exact, sampled, weight = [], [], []
    for _ in range(prompts):
        reference = rng.dirichlet(np.ones(outcomes))
        experts = [reference * np.exp(s * rng.normal(size=outcomes)) for s in (1.5, 0.7)]
        experts = [e / e.sum() for e in experts]
        ratios, importance = enumerated(reference, *experts)
        exact.append((ratios[0], importance[0]))
        chosen = np.concatenate([rng.choice(outcomes, drawn // 2, p=e) for e in experts])
        sampled.append(ratios[0][chosen])
        weight.append(np.log(reference[chosen]) - np.log(sum(experts)[chosen] / 2))
    truth = maxmin_weights(*(np.stack(part) for part in zip(*exact, strict=True))).weights[0]
    found = maxmin_weights(np.stack(sampled), np.stack(weight)).weights[0]
    assert found == pytest.approx(truth, abs=0.05)
    assert 0.2 < truth < 0.8


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 3e4])
def test_log_ratios_of_many_nats_are_minimised_all_the_same(scale):
    """F is then all but piecewise linear. It is convex: a gap of 0 is the optimum."""
    random = np.random.default_rng(3)
    for _ in range(40):
        prompts, samples, goals = (
            random.integers(1, 6),
            random.integers(1, 40),
            random.integers(2, 6),
        )
        ratios = scale * random.normal(size=(prompts, samples, goals))
        importance = random.normal(size=(prompts, samples))
        found = maxmin_weights(ratios, importance)
        assert found.kkt_gap < 1e-7 * max(1, scale)
        assert found.weights.sum() == pytest.approx(1) and found.weights.min() >= 0
        logs = importance[..., None] + ratios @ random.dirichlet(np.ones(goals), size=50).T
        others = np.logaddexp.reduce(logs, axis=1).mean(axis=0) - math.log(samples)
        assert found.value <= others.min() + 1e-9 * scale


def test_refused():
    ratios, importance = enumerated(UNIFORM, UNIFORM, UNIFORM)
    with pytest.raises(ValueError, match="1 or more prompters"):
        maxmin_weights(ratios[..., :0], importance)
    with pytest.raises(ValueError, match="betas: expected 2 numbers above 0"):
        maxmin_weights(ratios, importance, betas=[0.1, 0.0])
    with pytest.raises(ValueError, match="finite"):
        maxmin_weights(ratios + np.inf, importance)
    same = maxmin_weights(ratios, importance)  # nothing to choose between
    assert same.weights == pytest.approx([0.5, 0.5]) and same.value == pytest.approx(0.0)


def test_one_goal_at_another_kl_coef():
    """rho_ref exp(r / beta), whatever beta the prompter of r was trained with."""
    trained, wanted = 0.5, 0.8
    one = tilted(REWARDS[0], trained)
    found = maxmin_weights(*enumerated(REFERENCE, one), betas=[trained], beta=wanted)
    assert found.exponents == pytest.approx([trained / wanted]) and found.kkt_gap == 0.0
    softer = tilted(REWARDS[0], wanted)
    assert found.kl == pytest.approx(float(softer @ np.log(softer / REFERENCE)), abs=1e-9)


@pytest.mark.parametrize(
    "experts",
    [
        ((0.7, 0.1, 0.1, 0.1), (0.1, 0.6, 0.2, 0.1), (0.15, 0.15, 0.1, 0.6)),
        ((0.7, 0.1, 0.1, 0.1), (0.1, 0.7, 0.1, 0.1), (0.3, 0.3, 0.2, 0.2)),  # the last has none
    ],
)
@pytest.mark.parametrize("start", [(0.1, 0.1, 0.8), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0)])
def test_draws_of_the_mixture_itself_lead_to_lambda_star(experts, start):
    betas, beta = (0.05, 0.1, 0.2), 0.1
    ratios, importance = enumerated(UNIFORM, *experts)
    expected = maxmin_weights(ratios, importance, betas=betas, beta=beta).weights
    weights = np.array(start)
    for _ in range(8):
        logs = ratios[0] @ (weights * betas / beta)  # of the mixture, whose reference is uniform
        counts = np.rint(1e5 * np.exp(logs) / np.exp(logs).sum()).astype(int)
        drawn = np.repeat(ratios, counts, axis=1)
        weights = balance_weights(weights, drawn, betas, beta)
    assert weights == pytest.approx(expected, abs=2e-4)


def test_weights_are_found_where_draws_turn_at_once_from_one_prompter_to_another():
    """Three prompters whose rewrites are 20 nats from each other's; full steps go to and fro."""
    betas = np.ones(3)

    def draw(weights):
        shares = np.exp(10 * weights) / np.exp(10 * weights).sum()
        at = np.searchsorted(shares.cumsum(), (np.arange(480) + 0.5) / 480)
        ratios = np.where(np.eye(3)[at] > 0, 2.0, -20.0).reshape(40, 12, 3)
        return ratios, np.full((40, 12), 1.5)

    def least(weights):
        return draw(weights)[0].mean(axis=(0, 1)).min()

    weights, full_steps = np.array([0.58, 0.42, 0.0]), []
    for _ in range(8):
        full_steps.append(least(weights))
        weights = balance_weights(weights, draw(weights)[0], betas, 1.0)
    assert max(full_steps) < -19
    weights, number = balance_draws([0.58, 0.42, 0.0], draw, betas, 1.0)
    assert least(weights) > -16 and 0 < number < 8  # equal weights have -12.7
