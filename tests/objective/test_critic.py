"""Generalised advantages and the value loss by hand."""

from __future__ import annotations

import pytest
import torch

from alignpro.objective import gae, token_advantages, value_loss

KL = torch.tensor([0.5, 0.25, 1.0, 2.0], dtype=torch.float64)
VALUES = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64)
SEQUENCE = torch.tensor([0, 0, 0, 2])  # rewrite 1 has no tokens
REWARDS = torch.tensor([4.0, 99.0, 5.0], dtype=torch.float64)


def test_gae_by_hand():
    advantages, returns = gae(REWARDS, KL, VALUES, SEQUENCE, kl_coef=0.4, gae_lambda=0.5)
    # r = -0.4*0.25, -0.4*1, 4 and 5. delta = -0.1+2-1, -0.4-1-2, 4+1 and 5-3.
    last = 5.0
    middle = -3.4 + 0.5 * last
    first = 0.9 + 0.5 * middle
    assert advantages.tolist() == pytest.approx([first, middle, last, 2.0])
    assert returns.tolist() == pytest.approx([first + 1, middle + 2, last - 1, 5.0])


def test_lambda_one_is_the_return_less_the_value():
    advantages, returns = gae(REWARDS, KL, VALUES, SEQUENCE, kl_coef=0.4, gae_lambda=1.0)
    plain = token_advantages(REWARDS, KL, SEQUENCE, 0.4)
    torch.testing.assert_close(returns, plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(advantages, plain - VALUES, rtol=1e-14, atol=1e-14)


def test_nothing_of_it_carries_a_gradient():
    values, kl = VALUES.clone().requires_grad_(), KL.clone().requires_grad_()
    for result in gae(REWARDS, kl, values, SEQUENCE, kl_coef=0.4, gae_lambda=0.9):
        assert not result.requires_grad


def test_no_tokens():
    empty = torch.empty(0)
    advantages, returns = gae(
        torch.ones(2), empty, empty, torch.empty(0, dtype=torch.long), kl_coef=0.1, gae_lambda=1.0
    )
    assert advantages.shape == returns.shape == (0,)


def test_what_gae_refuses():
    with pytest.raises(ValueError, match=r"gae_lambda: expected a number in \[0, 1\], got 1.5"):
        gae(REWARDS, KL, VALUES, SEQUENCE, kl_coef=0.4, gae_lambda=1.5)
    with pytest.raises(ValueError, match="aligned"):
        gae(REWARDS, KL, VALUES[:3], SEQUENCE, kl_coef=0.4, gae_lambda=1.0)
    with pytest.raises(ValueError, match="rewards: expected one of every sequence below 3, got 2"):
        gae(REWARDS[:2], KL, VALUES, SEQUENCE, kl_coef=0.4, gae_lambda=1.0)


def test_value_loss_by_hand_and_in_parts():
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    targets = torch.tensor([0.0, 2.0, 1.0])
    loss = value_loss(values, targets, total_tokens=3)
    assert loss.item() == pytest.approx((1 + 0 + 9) / 6)
    loss.backward()
    assert values.grad.tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    parts = [value_loss(values[i], targets[i], total_tokens=3) for i in (slice(2), slice(2, 3))]
    assert sum(parts).item() == pytest.approx(loss.item())
    with pytest.raises(ValueError, match=r"values \(3,\): targets are \(2,\)"):
        value_loss(values, targets[:2], total_tokens=3)
