"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from alignpro.objective import kl_adjusted_rloo, rloo, zero_signal_groups


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


def test_kl_adjusted_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    kl = torch.tensor([[10.0, 20.0, 40.0]])
    # With 0.1: siblings' returns are 0, 0, 2. So 1 - (0+2)/2, 2 - (0+2)/2, 6 - (0+0)/2.
    expected = torch.tensor([[0.0, 1.0, 6.0]])
    torch.testing.assert_close(kl_adjusted_rloo(rewards, kl, 0.1), expected, rtol=0, atol=1e-6)


def test_kl_adjusted_without_kl_or_leash_is_rloo():
    rewards, kl = torch.randn(2, 3, 4, generator=torch.manual_seed(1)).unbind()
    assert torch.equal(kl_adjusted_rloo(rewards, torch.zeros_like(kl), 0.3), rloo(rewards))
    assert torch.equal(kl_adjusted_rloo(rewards, kl, 0.0), rloo(rewards))


def test_kl_adjusted_carries_no_gradient_of_the_kl():
    kl = torch.ones(1, 2, requires_grad=True)
    assert not kl_adjusted_rloo(torch.tensor([[1.0, 2.0]]), kl, 0.5).requires_grad


def test_zero_signal_groups():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6], [0.0, 0.0]])
    assert zero_signal_groups(rewards) == 2


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
    for function in (rloo, zero_signal_groups):
        with pytest.raises(ValueError, match=says):
            function(rewards)


def test_kl_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3, 2\)"):
        kl_adjusted_rloo(torch.ones(2, 3), torch.ones(3, 2), 0.1)
