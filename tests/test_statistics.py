"""Intervals, paired differences and the variance split, against numbers known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.statistics import (
    bootstrap_mean_ci,
    law_of_total_variance,
    paired_difference,
    variance,
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
