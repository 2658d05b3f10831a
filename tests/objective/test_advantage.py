"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignpro.objective import (
    MovingBaseline,
    group_normalized,
    reinforce,
    rloo,
    zero_advantage_groups,
)


def test_rloo_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; 0 - 3/2, 0 - 3/2, 3 - 0
    expected = torch.tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]])
    torch.testing.assert_close(rloo(rewards), expected, rtol=0, atol=0)


def test_two_rewrites_are_each_others_baseline():
    assert rloo(torch.tensor([[5.0, 3.0]])).tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(n):
    # 0.1 has no exact float: n * 0.1 - 0.1 over n - 1 is not 0.1 in general.
    assert not rloo(torch.full((3, n), 0.1)).any()


def test_advantages_of_a_group_sum_to_zero():
    advantages = rloo(torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(0)))
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5, dtype=torch.float64))


def test_group_normalized_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 8.0]])
    # Means 3 and 6; unbiased deviations sqrt((4+1+9)/2) and sqrt((1+1+4)/2).
    a, b = math.sqrt(7), math.sqrt(3)
    expected = torch.tensor([[-2 / a, -1 / a, 3 / a], [-1 / b, -1 / b, 2 / b]])
    torch.testing.assert_close(group_normalized(rewards), expected)


@pytest.mark.parametrize("advantages", [rloo, group_normalized])
def test_rounding_is_no_signal(advantages):
    # The mean of the same three rewards in another order: not the same float.
    group = [(0.1 + 0.2 + 0.3) / 3, (0.3 + 0.2 + 0.1) / 3]
    assert group[0] != group[1]
    rewards = torch.tensor([group, [0.0, 1e-3]], dtype=torch.float64)
    result = advantages(rewards)
    assert result[0].tolist() == [0.0, 0.0] and result[1].abs().min() > 0
    assert zero_advantage_groups(rewards).tolist() == [True, False]


def test_group_normalized_of_equal_rewards_is_exactly_zero():
    for value in (0.0, 0.1, -7.3, 1e8):
        assert group_normalized(torch.full((2, 7), value)).tolist() == [[0.0] * 7] * 2


def test_group_normalized_does_not_see_the_rewards_scale():
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.testing.assert_close(
        group_normalized(1e-5 * rewards + 2e-4), group_normalized(rewards), rtol=1e-6, atol=0
    )


def test_the_moving_baseline_by_hand():
    steps = [torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 7.0]]), torch.tensor([[0.0, 2.0]])]
    baseline = MovingBaseline()
    assert baseline.value is None
    # The first step: the others' mean.
    assert reinforce(steps[0], baseline).tolist() == [[-2.0, 2.0]]
    baseline = baseline.after(steps[0], 0.5)
    assert baseline.value == 2.0
    # The second: what the first earned, and nothing of its own.
    assert reinforce(steps[1], baseline).tolist() == [[3.0, 5.0]]
    baseline = baseline.after(steps[1], 0.5)
    assert baseline.value == pytest.approx((0.5 * 2 + 6) / 1.5)
    baseline = baseline.after(steps[2], 0.5)
    assert baseline.value == pytest.approx((0.25 * 2 + 0.5 * 6 + 1) / 1.75)
    # Equal rewards say something here: better than usual.
    assert (reinforce(torch.full((2, 3), 9.0), baseline) > 0).all()


def test_a_first_step_of_reinforce_is_over_all_prompts():
    # 1 - (2+3+6)/3, 2 - (1+3+6)/3, ...
    rewards = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
    expected = torch.tensor([[-8 / 3, -4 / 3], [0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(reinforce(rewards, MovingBaseline()), expected)
    torch.testing.assert_close(
        reinforce(rewards.reshape(4, 1), MovingBaseline()), expected.reshape(4, 1)
    )
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        reinforce(torch.ones(1, 1), MovingBaseline())


def test_zero_advantage_groups():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6], [0.0, 0.0]])
    assert zero_advantage_groups(rewards).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (torch.ones(3, 1), "at least 2 rewrites per prompt, got 1"),
        (torch.ones(3), r"\[prompts, rewrites\], got \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), "floating point"),
        (torch.tensor([[1.0, float("nan")]]), "finite"),
        (torch.tensor([[1.0, float("inf")]]), "finite"),
    ],
)
def test_what_is_no_group_is_refused(rewards, says):
    for function in (rloo, group_normalized, zero_advantage_groups):
        with pytest.raises(ValueError, match=says):
            function(rewards)
    if says != "at least 2 rewrites per prompt, got 1":
        with pytest.raises(ValueError, match=says):
            reinforce(rewards, MovingBaseline(1.0, 1.0))
