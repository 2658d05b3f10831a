"""N rewrites against M responses, under a budget."""

from __future__ import annotations

import pytest

from alignpro.objective import allocate, allocations


def test_allocations():
    assert allocations(12) == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6)]
    assert allocations(2) == [(2, 1)]


def test_by_hand():
    costs = {"rewrite_cost": 4.0, "response_cost": 1.0}
    # (1 + 9/M)(4 + M) is 50, 33, 28, 26, 25 and M* = 6; times N/(N-1): 54.5, 39.6, 37.3, 39, 50.
    assert allocate(12, between=1.0, within=9.0, **costs) == (4, 3)
    # M* = 6 where N is large.
    assert allocate(6 * 64, between=1.0, within=9.0, **costs) == (64, 6)
    # 10, 9, 9.3, ...: times N/(N-1) 10.9, 10.8, 12.4.
    assert allocate(12, between=1.0, within=1.0, **costs) == (6, 2)
    assert allocate(12, between=9.0, within=1.0, **costs) == (12, 1)


def test_a_free_rewrite_makes_one_response_best():
    for within in (0.0, 1.0, 1e6):
        counts = allocate(12, between=1e-3, within=within, rewrite_cost=0.0, response_cost=1.0)
        assert counts == (12, 1)


def test_the_choice_is_the_least_of_all():
    for between, within, cost in [(0.3, 2.0, 5.0), (1.0, 0.1, 80.0), (0.02, 1.0, 0.5)]:
        n, m = allocate(24, between=between, within=within, rewrite_cost=cost, response_cost=1.0)
        chosen = (between + within / m) / (n - 1) * n * (cost + m)
        assert n * m == 24 and n >= 2
        for other_n, other_m in allocations(24):
            # Variance under a leave-one-out baseline, times what the rewrites cost.
            variance = (between + within / other_m) / (other_n - 1)
            assert chosen <= variance * other_n * (cost + other_m) + 1e-12


def test_a_split_below_zero_counts_as_none():
    costs = {"rewrite_cost": 4.0, "response_cost": 1.0}
    assert allocate(8, between=-0.1, within=1.0, **costs) == (4, 2)  # 4 and 4: a tie
    assert allocate(8, between=1.0, within=-0.1, **costs) == (8, 1)
    assert allocate(8, between=-1.0, within=-1.0, **costs) == (8, 1)  # nothing varies: likewise


def test_what_is_refused():
    with pytest.raises(ValueError, match="budget: expected at least 2"):
        allocate(1, between=1.0, within=1.0, rewrite_cost=1.0, response_cost=1.0)
    with pytest.raises(ValueError, match="costs: expected 0 or more, got -1"):
        allocate(4, between=1.0, within=1.0, rewrite_cost=-1.0, response_cost=1.0)
