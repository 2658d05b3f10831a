"""The loss of pairs: by hand, by gradients, and by the optimum that it has."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from alignpro.objective.preference import dpo_loss


def pairs(*values):
    """Chosen, rejected and the reference's two, of one pair."""
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_the_loss_by_hand():
    # Rewards 0.5 (-1 + 1.5) = 0.25 and 0.5 (-2 + 1.75) = -0.125.
    result = dpo_loss(*pairs(-1.0, -2.0, -1.5, -1.75), beta=0.5)
    assert (result.chosen_reward.item(), result.rejected_reward.item()) == (0.25, -0.125)
    assert result.margin.item() == 0.375 and result.correct.item() == 1.0
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-0.375)), rel=1e-15)
    smooth = dpo_loss(*pairs(-1.0, -2.0, -1.5, -1.75), beta=0.5, label_smoothing=0.2)
    by_hand = 0.8 * math.log1p(math.exp(-0.375)) + 0.2 * math.log1p(math.exp(0.375))
    assert smooth.loss.item() == pytest.approx(by_hand, rel=1e-15)


def test_a_policy_that_is_its_reference_has_a_loss_of_log_2_exactly():
    both = torch.tensor([-3.7, -0.2], dtype=torch.float32)
    result = dpo_loss(both, both.flip(0), both, both.flip(0), beta=0.3)
    assert result.loss.tolist() == [math.log(2)] * 2
    assert result.margin.tolist() == [0.0, 0.0] and result.correct.tolist() == [0.5, 0.5]


def test_a_far_margin_overflows_nothing():
    result = dpo_loss(*pairs(-1e6, 0.0, 0.0, 0.0), beta=1.0)
    assert result.loss.item() == 1e6
    assert dpo_loss(*pairs(0.0, -1e6, 0.0, 0.0), beta=1.0).loss.item() == 0.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_the_gradient(label_smoothing):
    draw = torch.randn(4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    chosen, rejected = (row.clone().requires_grad_() for row in draw[:2])
    options = {"beta": 0.7, "label_smoothing": label_smoothing}

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, draw[2], draw[3], **options).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    loss(chosen, rejected).sum().backward()
    margin = dpo_loss(chosen, rejected, draw[2], draw[3], **options).margin.detach()
    expected = 0.7 * (label_smoothing - torch.sigmoid(-margin))
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_swapped_pairs_flip_the_gradient():
    at = torch.tensor([-1.0, -2.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)

    def gradient(chosen, rejected):
        loss = dpo_loss(at[[chosen]], at[[rejected]], at[[2]], at[[3]], beta=0.5).loss
        return torch.autograd.grad(loss.sum(), at)[0][:2]

    torch.testing.assert_close(gradient(0, 1), torch.tensor([-0.25, 0.25], dtype=torch.float64))
    swapped = dpo_loss(at[[1]], at[[0]], at[[3]], at[[2]], beta=0.5).loss
    torch.testing.assert_close(torch.autograd.grad(swapped.sum(), at)[0][:2], -gradient(0, 1))


def test_the_reference_is_a_constant():
    reference = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    dpo_loss(chosen, reference, reference, reference, beta=1.0).loss.sum().backward()
    assert reference.grad.item() == 0.5  # as the rejected answer alone


def test_smoothing_puts_the_optimum_at_a_finite_margin():
    margin = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo_loss(margin, zero, zero, zero, beta=1.0, label_smoothing=0.1).loss.sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)


# Three answers (refuse, safe, harmful) under a reward that is wrong about the last.
OWN, SAFE = (0.1, 0.2, 0.7), (0.6, 0.35, 0.05)  # pi_ref(.|x), pi_ref(.|x_s)
REWARD = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
BETA = 0.5


def population_loss(logits, reference):
    """Over all ordered pairs of answers, by how often Bradley and Terry's model prefers one."""
    logp, log_reference = logits.log_softmax(0), torch.tensor(reference).double().log()
    both = list(itertools.permutations(range(3), 2))
    chosen, rejected = (torch.tensor(side) for side in zip(*both, strict=True))
    result = dpo_loss(
        logp[chosen], logp[rejected], log_reference[chosen], log_reference[rejected], beta=BETA
    )
    often = torch.sigmoid(REWARD[chosen] - REWARD[rejected])
    return (often * result.loss).sum()


@pytest.mark.parametrize(
    ("reference", "optimum"),
    [(OWN, (0.017194, 0.093476, 0.889330)), (SAFE, (0.312361, 0.495300, 0.192338))],
    ids=["DPO", "E-DPO"],
)
def test_the_optimum_is_the_kl_regularised_one(reference, optimum):
    start = torch.tensor(OWN).double().log()  # the policy reads x in both
    logits = start.clone().requires_grad_()
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=200, **exact)

    def closure():
        optimizer.zero_grad()
        loss = population_loss(logits, reference)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    found = logits.detach().softmax(0)
    torch.testing.assert_close(found, torch.tensor(optimum).double(), rtol=0, atol=1e-6)
    implicit = BETA * (found.log() - torch.tensor(reference).double().log())
    torch.testing.assert_close(implicit - implicit[0], REWARD, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "options", "line"),
    [
        (([0.0], [0.0, 1.0], [0.0], [0.0]), {}, r"one shape \[pairs\], got \(1,\), \(2,\)"),
        (([[0.0]], [[0.0]], [[0.0]], [[0.0]]), {}, r"one shape \[pairs\], got \(1, 1\)"),
        (([math.nan], [0.0], [0.0], [0.0]), {}, "finite numbers, got NaN"),
        (([0.0], [0.0], [-math.inf], [0.0]), {}, "finite numbers"),
        (([0.0], [0.0], [0.0], [0.0]), {"beta": 0.0}, "beta: expected a finite number above 0"),
        (([0.0],) * 4, {"label_smoothing": 0.5}, "label_smoothing: expected at least 0 and below"),
    ],
)
def test_bad_input(values, options, line):
    tensors = [torch.tensor(value) for value in values]
    with pytest.raises(ValueError, match=line):
        dpo_loss(*tensors, **{"beta": 1.0, **options})
