"""Weights, effective sample size and losses of the closed-form fit, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignpro.objective import rloo
from alignpro.objective.closed_form import (
    closed_form_weights,
    effective_samples,
    log_variance_loss,
    off_policy_kl,
    weighted_likelihood_loss,
)


def test_weights_by_hand():
    # exp(R / 0.5) in proportions 1 : 2 : 5, and equal rewards.
    rewards = torch.tensor([[0.0, 0.5 * math.log(2), 0.5 * math.log(5)], [0.7, 0.7, 0.7]])
    weights = closed_form_weights(rewards, 0.5)
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        effective_samples(expected), torch.tensor([64 / 30, 3.0], dtype=torch.float64)
    )


def test_a_small_kl_coef_overflows_nothing():
    weights = closed_form_weights(torch.tensor([[1e4, 0.0], [-1e4, -1e4]]), 1e-3)
    assert weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert closed_form_weights(torch.tensor([[1.0, 0.0]]), 1e-310).tolist() == [[1.0, 0.0]]


def test_a_constant_added_to_a_prompts_rewards_changes_nothing():
    rewards = torch.tensor([[0.25, 1.5, -0.75]])
    torch.testing.assert_close(
        closed_form_weights(rewards, 0.5), closed_form_weights(rewards + 8.0, 0.5)
    )


REWARDS = torch.tensor([[0.0, 0.5 * math.log(3)], [0.7, 0.7]])


def test_likelihood_by_hand():
    log_ratio = torch.tensor([[-1.0, -2.0], [-4.0, 8.0]], requires_grad=True)
    loss = weighted_likelihood_loss(log_ratio, REWARDS, 0.5)
    assert loss.item() == pytest.approx((0.25 * 1 + 0.75 * 2 - 2) / 2)
    loss.backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([[-0.125, -0.375], [-0.25, -0.25]]))


def test_variance_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]])
    log_ratio = torch.tensor([[1.0, -1.0, 0.0], [3.0, 0.0, 0.0]], requires_grad=True)
    # R - 2 log ratio: (-1, 2, 0.5) of variance 2.25, (-4, 2, 2) of variance 12.
    loss = log_variance_loss(log_ratio, rewards, 2.0)
    assert loss.item() == pytest.approx((2.25 + 12) / 2 / (2 * 2.0))


def test_the_variance_starts_with_the_gradient_of_rloo_and_ends_at_the_optimum():
    rewards = torch.tensor([[0.3, -1.0, 0.9, 0.1], [0.0, 2.0, 2.0, 1.5]])
    log_ratio = torch.zeros(2, 4, requires_grad=True)
    log_variance_loss(log_ratio, rewards, 0.7).backward()
    torch.testing.assert_close(log_ratio.grad, -rloo(rewards) / rewards.numel())
    # rho* / rho_ref is exp(R / kl_coef) / Z, whatever Z is.
    optimum = (rewards / 0.7 - torch.tensor([[3.0], [-1.0]])).requires_grad_()
    loss = log_variance_loss(optimum, rewards, 0.7)
    loss.backward()
    assert loss.item() < 1e-12 and float(optimum.grad.abs().max()) < 1e-6


def test_off_policy_kl_by_hand():
    log_ratio = torch.tensor([math.log(2), math.log(3), 5.0, math.log(7), 1.0])
    kl = torch.tensor([0.5, 0.25, 0.125, 4.0, 1.0])
    sequence = torch.tensor([0, 0, 0, 2, 2])
    got = off_policy_kl(log_ratio, kl, sequence, 4)
    expected = torch.tensor([0.5 + 2 * 0.25 + 6 * 0.125, 0.0, 4.0 + 7 * 1.0, 0.0])
    torch.testing.assert_close(got, expected)
    assert off_policy_kl(kl[:0], kl[:0], sequence[:0], 2).tolist() == [0.0, 0.0]


def test_losses_refuse_what_is_not_aligned():
    for loss in (weighted_likelihood_loss, log_variance_loss):
        with pytest.raises(ValueError, match=r"one shape .*, got \(2, 3\) and \(2, 2\)"):
            loss(torch.zeros(2, 3), torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match="at least 2 rewrites per prompt, got 1"):
        log_variance_loss(torch.zeros(2, 1), torch.zeros(2, 1), 1.0)


@pytest.mark.parametrize(
    ("rewards", "kl_coef", "message"),
    [
        (torch.zeros(3), 1.0, r"^rewards: expected shape \[prompts, rewrites\], got \(3,\)"),
        (torch.zeros(3, 0), 1.0, r"^rewards: expected shape"),
        (torch.tensor([[0.0, math.nan]]), 1.0, "^rewards: expected finite"),
        (torch.zeros(1, 2), 0.0, "^kl_coef: expected a finite number above 0"),
        (torch.zeros(1, 2), math.inf, "^kl_coef: expected a finite number above 0"),
    ],
)
def test_what_is_refused(rewards, kl_coef, message):
    with pytest.raises(ValueError, match=message):
        closed_form_weights(rewards, kl_coef)
