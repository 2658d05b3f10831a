"""Intervals, paired differences and the variance split, against numbers known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.statistics import (
    bootstrap_mean_ci,
    calibration,
    law_of_total_variance,
    length_controlled_win_rate,
    paired_difference,
    proportion_ci,
    ratio_of_means,
    variance,
    variance_change,
)


def test_the_interval_is_that_of_the_normal_theory_for_many_normal_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    interval = bootstrap_mean_ci(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert interval.mean == values.mean()
    # 10,000 resamples: the bounds themselves wobble by about 2% of the half width.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        _, low, high = bootstrap_mean_ci(rng.exponential(size=64), seed=trial, resamples=500)
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 400 <= 0.975  # 95% with three standard errors, and skew costs a little


def test_two_values_by_hand():
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    interval = bootstrap_mean_ci([0.0, 1.0], level=0.4)
    assert tuple(interval) == (0.5, 0.5, 0.5)
    assert tuple(bootstrap_mean_ci([0.0, 1.0])) == (0.5, 0.0, 1.0)


def test_a_constant_has_no_width():
    assert tuple(bootstrap_mean_ci([0.25] * 10)) == (0.25, 0.25, 0.25)


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap_mean_ci(values, seed=7) == bootstrap_mean_ci(values, seed=7)
    assert bootstrap_mean_ci(values, seed=7) != bootstrap_mean_ci(values, seed=8)


def test_memory_chunks_do_not_change_the_result(monkeypatch):
    values = np.random.default_rng(3).normal(size=37)
    whole = bootstrap_mean_ci(values, resamples=1001)
    monkeypatch.setattr("alignpro.statistics._CHUNK_ELEMENTS", 100)
    assert bootstrap_mean_ci(values, resamples=1001) == whole


def test_pairing_takes_out_what_the_prompts_share():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 10, size=100)
    control = difficulty + rng.normal(0, 0.1, size=100)
    treated = difficulty + 0.5 + rng.normal(0, 0.1, size=100)
    mean, low, high = paired_difference(treated, control)
    assert 0.4 < low < mean < high < 0.6
    assert mean == pytest.approx(np.mean(treated) - np.mean(control))
    swapped = paired_difference(control, treated)
    assert swapped.high < -0.4


def test_a_ratio_resamples_both_sides_together():
    rng = np.random.default_rng(6)
    gap = rng.uniform(0.5, 5.0, size=200)
    # Every prompt gains the same share of its gap, so every draw of prompts has the same ratio.
    assert ratio_of_means(0.3 * gap, gap) == pytest.approx((0.3, 0.3, 0.3))
    noisy = 0.3 * gap + rng.normal(0, 0.5, size=200)
    share = ratio_of_means(noisy, gap)
    assert share.mean == pytest.approx(noisy.mean() / gap.mean())
    # The delta method for a ratio of means over the same prompts.
    half = 1.96 * (noisy - share.mean * gap).std(ddof=1) / gap.mean() / math.sqrt(200)
    assert share.low == pytest.approx(share.mean - half, abs=0.1 * half)
    assert share.high == pytest.approx(share.mean + half, abs=0.1 * half)


def test_a_ratio_with_zeros_below_stays_finite():
    share = ratio_of_means([1.0, 0.0], [1.0, 0.0])  # both drawn from the second: 0 / 0, left out
    assert tuple(share) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("numerator", "denominator", "says"),
    [
        ([1.0], [1.0], "at least 2"),
        ([1.0, 2.0], [1.0], "at least 2 values of the same prompts, got 2 and 1"),
        ([1.0, 2.0], [1.0, -1.0], "mean other than 0"),
        ([1.0, math.inf], [1.0, 1.0], "numerator: expected finite"),
    ],
)
def test_bad_ratios(numerator, denominator, says):
    with pytest.raises(ValueError, match=says):
        ratio_of_means(numerator, denominator)


def test_length_control_recovers_the_rate_at_equal_lengths():
    rng = np.random.default_rng(7)
    lengths = rng.normal(20, 30, size=3000)
    scale = math.sqrt(np.square(lengths).mean())
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(lengths / scale))))
    wins = (rng.random(3000) < chance).astype(float)
    rate = length_controlled_win_rate(wins, lengths, resamples=200)
    truth = 1 / (1 + math.exp(-0.4))
    assert wins.mean() > 0.68  # what length adds
    assert rate.low < truth < rate.high and rate.high - rate.low < 0.1
    # Any unit of length, and the other side's view.
    assert length_controlled_win_rate(wins, lengths * 7, resamples=2).mean == pytest.approx(
        rate.mean, abs=1e-4
    )
    assert length_controlled_win_rate(1 - wins, -lengths, resamples=2).mean == pytest.approx(
        1 - rate.mean, abs=1e-4
    )


def test_length_control_at_equal_lengths_is_the_plain_rate():
    # 15 wins of 20: sigmoid(a) = 3/4 but for the prior, a normal of deviation 10.
    rate = length_controlled_win_rate([1.0] * 15 + [0.0] * 5, [0.0] * 20, resamples=50)
    assert rate.mean == pytest.approx(0.75, abs=1e-3)
    ties = length_controlled_win_rate([0.5] * 20, [0.0] * 20, resamples=50)
    assert tuple(ties) == pytest.approx((0.5, 0.5, 0.5))
    always = length_controlled_win_rate([1.0] * 20, [0.0] * 20, resamples=50)
    assert 0.99 < always.mean < 1


def test_length_control_resamples_prompts():
    """Ten pairs of one prompt that agree are no more evidence than one."""
    rng = np.random.default_rng(8)
    wins = (rng.random(40) < 0.6).astype(float)
    single = length_controlled_win_rate(wins, np.zeros(40), resamples=300)
    prompts = np.repeat(np.arange(40), 10)
    repeated = length_controlled_win_rate(
        np.repeat(wins, 10), np.zeros(400), prompts=prompts, resamples=300
    )
    as_if_new = length_controlled_win_rate(np.repeat(wins, 10), np.zeros(400), resamples=300)
    width = single.high - single.low
    assert repeated.high - repeated.low == pytest.approx(width, rel=0.2)
    assert as_if_new.high - as_if_new.low < 0.5 * width


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1.0, 0.0], [1.0]), "expected aligned pairs"),
        (([1.0, 2.0], [0.0, 0.0]), "preferences: expected numbers between 0 and 1"),
        (([1.0], [0.0]), "at least 2 for an interval"),
        (([1.0, math.nan], [0.0, 0.0]), "finite"),
    ],
)
def test_bad_pairs(arguments, says):
    with pytest.raises(ValueError, match=says):
        length_controlled_win_rate(*arguments)
    with pytest.raises(ValueError, match="at least 2 for an interval, got 1"):
        length_controlled_win_rate([1.0, 0.0], [0.0, 0.0], prompts=[3, 3])


def test_variance_is_unbiased():
    assert variance([1.0, 2.0, 6.0]) == pytest.approx(7.0)  # (4 + 1 + 9) / 2


def test_the_split_by_hand():
    # Prompt 1: rewrites with responses (0, 2) and (4, 6). Within 2; means 1 and 5, variance 8.
    # Prompt 2: (1, 1) and (1, 1): nothing varies.
    split = law_of_total_variance([[[0, 2], [4, 6]], [[1, 1], [1, 1]]])
    assert split.within_rewrite == pytest.approx(1.0)
    assert split.between_rewrites == pytest.approx(4.0 - 1.0 / 2)
    assert split.prompter_share == pytest.approx(3.5 / 4.5)


def test_the_split_is_unbiased():
    rng = np.random.default_rng(5)
    prompts = rng.normal(0, 5, size=(20000, 1, 1))
    rewrites = rng.normal(0, 0.5, size=(20000, 3, 1))
    noise = rng.normal(0, 2.0, size=(20000, 3, 2))
    split = law_of_total_variance(prompts + rewrites + noise)
    assert split.within_rewrite == pytest.approx(4.0, rel=0.02)
    assert split.between_rewrites == pytest.approx(0.25, abs=0.06)  # 2.6 standard errors


def test_noise_alone_may_come_out_negative_and_is_no_share():
    split = law_of_total_variance([[[0.0, 10.0], [10.0, 0.0]]])
    assert split.between_rewrites == pytest.approx(-25.0)
    assert split.prompter_share == 0.0
    assert law_of_total_variance(np.zeros((1, 2, 2))).prompter_share == 0.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "at least 2"),
        ([1.0], "at least 2 .*got 1"),
        ([1.0, math.nan], "finite"),
        ([[1.0, 2.0]], "1 dimension"),
        (["a", "b"], "numbers"),
    ],
)
def test_too_little_or_no_numbers(values, says):
    for function in (bootstrap_mean_ci, variance):
        with pytest.raises(ValueError, match=says):
            function(values)


def test_other_bad_input():
    with pytest.raises(ValueError, match="same prompts, got 3 and 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean_ci([1.0, 2.0], level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean_ci([1.0, 2.0], resamples=0)
    for shape in ((2, 1, 2), (2, 2, 1), (0, 2, 2)):
        with pytest.raises(ValueError, match="tell the sources of variance apart"):
            law_of_total_variance(np.zeros(shape))
    with pytest.raises(ValueError, match="3 dimension"):
        law_of_total_variance(np.zeros((2, 2)))


def test_exact_intervals_of_a_proportion():
    """Clopper and Pearson's, by scipy."""
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for successes, trials in ((0, 10), (1, 12), (8, 10), (40, 96), (5, 5)):
        found = proportion_ci(successes, trials)
        exact = binomtest(successes, trials).proportion_ci(method="exact")
        assert found.mean == successes / trials
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    between = proportion_ci(7.5, 10)  # shares of several draws: rounded outward
    assert (between.low, between.high) == (proportion_ci(7, 10).low, proportion_ci(8, 10).high)
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="successes: expected 0 to"):
            proportion_ci(successes, trials)


def test_calibration_by_hand():
    found = calibration([0.55, 0.58, 0.92, 1.0], [1.0, 0.0, 1.0, 0.5], bins=10)
    assert [(b.low, b.high, b.count) for b in found.bins] == [(0.5, 0.6, 2), (0.9, 1.0, 2)]
    assert [b.confidence for b in found.bins] == pytest.approx([0.565, 0.96])
    assert [b.accuracy for b in found.bins] == [0.5, 0.75]
    assert found.error == pytest.approx((2 * 0.065 + 2 * 0.21) / 4)
    assert found.brier == pytest.approx((0.45**2 + 0.58**2 + 0.08**2 + 0.5**2) / 4)
    for probabilities, outcomes in (([1.5], [1.0]), ([0.5], [-1.0])):
        with pytest.raises(ValueError, match="expected numbers between 0 and 1"):
            calibration(probabilities, outcomes)
    with pytest.raises(ValueError, match="expected aligned values, at least one, got 0 and 0"):
        calibration([], [])


def test_a_change_of_variance_by_hand():
    control = [[0.0, 4.0], [2.0], [1.0, 3.0]]
    treated = [[1.0], [3.0], [2.0, 2.0]]
    found = variance_change(treated, control)
    one, other = (np.var(np.concatenate(rows), ddof=1) for rows in (treated, control))
    assert found.mean == pytest.approx(one / other - 1)
    assert found.low <= found.mean <= found.high
    shifted = [[1e6 + value for value in row] for row in treated]
    assert variance_change(shifted, control) == pytest.approx(found)
    assert variance_change(control, control) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least 2 prompts, the same for both, got 2 and 3"):
        variance_change(treated[:2], control)
    with pytest.raises(ValueError, match="control: expected values that vary"):
        variance_change(treated, [[1.0], [1.0], [1.0]])


def test_the_interval_of_a_change_of_variance_covers_it():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        control = rng.normal(0, 1, (60, 1)) + rng.normal(0, 1, (60, 4))
        treated = rng.normal(0, 1, (60, 1)) + rng.normal(0, 0.5, (60, 4))
        found = variance_change(treated.tolist(), control.tolist())
        covered += found.low <= 1.25 / 2 - 1 <= found.high
    assert 86 <= covered <= 100  # 95 by the level
