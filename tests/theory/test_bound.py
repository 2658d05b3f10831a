"""The bound on a space small enough for exact sums: it holds, and every estimator agrees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from alignpro.theory.bound import (
    prompting_bound,
    tilted_total_variation,
    total_variation_samples,
)
from alignpro.theory.optimum import optimum_weights, weights_kl

PROMPTS, REWRITES, RESPONSES = 4, 5, 7


@dataclass
class World:
    """Every distribution and reward of a random problem, written out."""

    target: np.ndarray  # pi_F(y | x) [P, Y]
    prompted: np.ndarray  # pi_F(y | x') [P, X', Y]
    tuned: np.ndarray  # pi*(y | x) [P, Y]
    untuned: np.ndarray  # rho_sft(x' | x) [P, X']
    reward: np.ndarray  # r(x, y) [P, Y], in [low, high]
    range: tuple[float, float]
    kl_coef: float


def world(seed):
    draw = np.random.default_rng(seed)
    concentration = 10 ** draw.uniform(-1, 1)
    low = draw.uniform(-2, 2)
    high = low + 10 ** draw.uniform(-1, 1)
    target = draw.dirichlet(np.full(RESPONSES, concentration), size=PROMPTS)
    other = draw.dirichlet(np.full(RESPONSES, concentration), size=(PROMPTS, REWRITES))
    near = draw.uniform()  # rewrites that change little make the bound tight
    return World(
        target=target,
        prompted=near * target[:, None] + (1 - near) * other,
        tuned=near * target
        + (1 - near) * draw.dirichlet(np.full(RESPONSES, concentration), size=PROMPTS),
        untuned=draw.dirichlet(np.full(REWRITES, concentration), size=PROMPTS),
        reward=draw.uniform(low, high, size=(PROMPTS, RESPONSES)),
        range=(low, high),
        kl_coef=10 ** draw.uniform(-2, 1),
    )


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum(axis=-1)


def exact(w):
    """tv_tuned, tv_rewrites, kl and gap [P], by sums over everything."""
    values = (w.prompted * w.reward[:, None]).sum(axis=2)  # R(x, x')
    tilted = w.untuned * np.exp((values - values.max(axis=1, keepdims=True)) / w.kl_coef)
    optimum = tilted / tilted.sum(axis=1, keepdims=True)
    ratio = np.where(optimum > 0, optimum / np.maximum(w.untuned, 1e-300), 1.0)
    return {
        "tv_tuned": total_variation(w.tuned, w.target),
        "tv_rewrites": (w.untuned * total_variation(w.target[:, None], w.prompted)).sum(axis=1),
        "kl": np.maximum((optimum * np.log(ratio)).sum(axis=1), 0.0),
        "gap": (w.tuned * w.reward).sum(axis=1) - (optimum * values).sum(axis=1),
    }


def test_it_holds_whatever_the_world():
    slacks = []
    for seed in range(500):
        w = world(seed)
        result = prompting_bound(reward_range=w.range, kl_coef=w.kl_coef, **exact(w))
        assert result.holds, f"seed {seed}: {result}"
        slacks.append(result.slack.mean / (w.range[1] - w.range[0]))
    assert min(slacks) < 0.02  # some are tight, so that a bound too small would have been seen


@pytest.mark.parametrize("term", ["tv_tuned", "tv_rewrites", "kl"])
def test_every_term_is_needed_as_it_is(term):
    """Worlds in which one step is tight: a little less of its term, and the bound breaks."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    reward = np.where(p > q, 1.0, 0.0)
    step, kl_coef = np.array([q, q]), 5.0
    tuned, target, prompted = {
        "tv_tuned": (p, q, step),  # only tuning helps
        "tv_rewrites": (p, p, step),  # every rewrite harms
        "kl": (p, p, np.array([p, q])),  # half of the rewrites do
    }[term]
    w = World(
        target=target[None].repeat(2, axis=0),
        prompted=prompted[None].repeat(2, axis=0),
        tuned=tuned[None].repeat(2, axis=0),
        untuned=np.full((2, 2), 0.5),
        reward=reward[None].repeat(2, axis=0),
        range=(0.0, 1.0),
        kl_coef=kl_coef,
    )
    terms = exact(w)
    assert prompting_bound(reward_range=w.range, kl_coef=kl_coef, **terms).holds
    # For a weak tilt KL and reverse KL are alike, and the last step's slack is the reverse one.
    terms[term] = terms[term] * (2.1 if term == "kl" else 0.99)
    assert not prompting_bound(reward_range=w.range, kl_coef=kl_coef, **terms).holds


def test_the_arithmetic_by_hand():
    result = prompting_bound(
        reward_range=(-1.0, 3.0),
        kl_coef=0.5,
        tv_tuned=[0.1, 0.3],
        tv_rewrites=[0.2, 0.0],
        kl=[0.4, 2.0],
        gap=[0.5, 0.25],
    )
    # 4 * (0.1 + 0.2) - 0.5 * 0.4 = 1.0 and 4 * 0.3 - 0.5 * 2.0 = 0.2
    assert result.bound.mean == pytest.approx(0.6)
    assert (result.bound.low, result.bound.high) == pytest.approx((0.2, 1.0))
    assert result.measured_gap.mean == pytest.approx(0.375)
    assert result.slack.mean == pytest.approx(0.225)
    assert (result.slack.low, result.slack.high) == pytest.approx((-0.05, 0.5))  # paired
    assert result.terms["kl"].mean == pytest.approx(1.2)
    assert result.holds and not result.vacuous


def test_holds_and_vacuous_are_computed():
    terms = {"tv_tuned": [0.5, 0.5], "tv_rewrites": [0.5, 0.6], "kl": [0.0, 0.0]}
    vacuous = prompting_bound(reward_range=(3.0, 5.0), kl_coef=1.0, **terms, gap=[0.0, 0.0])
    assert vacuous.vacuous and vacuous.holds
    broken = prompting_bound(reward_range=(3.0, 5.0), kl_coef=1.0, **terms, gap=[3.0, 3.0])
    assert not broken.holds


def test_total_variation_from_samples_of_one_side():
    """Means over many draws against sums over all; the arguments are not interchangeable."""
    draw = np.random.default_rng(5)
    w = world(11)
    p, q = w.target[0], w.prompted[0, 1]
    assert total_variation(p, q) > 0.2
    for one, other in ((p, q), (q, p)):
        y = draw.choice(RESPONSES, size=100_000, p=one)
        estimate = total_variation_samples(np.log(one[y]), np.log(other[y])).mean()
        assert estimate == pytest.approx(total_variation(p, q), abs=0.01)  # 6 standard errors
        swapped = total_variation_samples(np.log(other[y]), np.log(one[y])).mean()
        assert abs(swapped - total_variation(p, q)) > 0.03


def test_total_variation_at_the_edges():
    assert total_variation_samples([-3.0, -500.0], [-3.0, -500.0]) == pytest.approx([0, 0], abs=0)
    assert total_variation_samples([-1.0], [-np.inf]) == pytest.approx([1.0])
    assert total_variation_samples([-900.0], [-1.0]) == pytest.approx([0.0])  # no overflow
    assert total_variation_samples([0.0], [-1e-12]) == pytest.approx([1e-12], rel=1e-6)


def test_every_estimator_agrees_with_its_sum():
    """The terms as a run estimates them, from draws of the same world."""
    draw = np.random.default_rng(6)
    w, count = world(3), 40_000
    sums = exact(w)
    values = (w.prompted * w.reward[:, None]).sum(axis=2)
    for p in range(PROMPTS):
        tuned = draw.choice(RESPONSES, size=count, p=w.tuned[p])
        samples = total_variation_samples(np.log(w.tuned[p][tuned]), np.log(w.target[p][tuned]))
        assert samples.mean() == pytest.approx(sums["tv_tuned"][p], abs=0.02)
        rewrites = draw.choice(REWRITES, size=count, p=w.untuned[p])
        answers = (draw.random(count)[:, None] > w.prompted[p][rewrites].cumsum(axis=1)).sum(axis=1)
        samples = total_variation_samples(
            np.log(w.prompted[p][rewrites, answers]), np.log(w.target[p][answers])
        )
        assert samples.mean() == pytest.approx(sums["tv_rewrites"][p], abs=0.02)
        kl = weights_kl(optimum_weights(values[p][rewrites], w.kl_coef))
        assert kl == pytest.approx(sums["kl"][p], rel=0.05, abs=0.01)


def test_the_closed_form_target():
    """TV(pi*, pi_F) from pi_F's own samples; low for few of them."""
    draw = np.random.default_rng(7)
    probabilities, reward, kl_coef = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), 0.7
    tilted = probabilities * np.exp(reward / kl_coef)
    true = total_variation(tilted / tilted.sum(), probabilities)
    many = reward[draw.choice(3, size=(2, 50_000), p=probabilities)]
    assert tilted_total_variation(many, kl_coef) == pytest.approx([true, true], abs=0.01)
    few = reward[draw.choice(3, size=(20_000, 3), p=probabilities)]
    assert tilted_total_variation(few, kl_coef).mean() < true - 0.05
    assert tilted_total_variation(few, 1e-6).max() <= 1 - 1 / 3 + 1e-9
    assert tilted_total_variation(few, 1e9) == pytest.approx(np.zeros(20_000), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_range": (1.0, 1.0)}, "low < high"),
        ({"kl_coef": 0.0}, "kl_coef: expected a number above 0, got 0.0"),
        ({"kl": [0.1]}, r"kl: expected one number a prompt, \[2\], got shape \[1\]"),
        ({"tv_tuned": [0.1, 1.1]}, "tv_tuned: expected numbers from 0 to 1.0"),
        ({"kl": [-0.1, 0.1]}, "kl: expected numbers from 0"),
    ],
)
def test_bad_input(changes, message):
    terms = {"tv_tuned": [0.1, 0.1], "tv_rewrites": [0.1, 0.1], "kl": [0.1, 0.1], "gap": [0.0, 0.0]}
    with pytest.raises(ValueError, match=message):
        prompting_bound(**{"reward_range": (0.0, 1.0), "kl_coef": 0.1, **terms, **changes})
    with pytest.raises(ValueError, match="finite numbers"):
        total_variation_samples([-np.inf], [-1.0])
    with pytest.raises(ValueError, match=r"expected shape \[2\], got \[1\]"):
        total_variation_samples([-1.0, -1.0], [-1.0])
