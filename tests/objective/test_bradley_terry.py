"""The linear head: where its loss is least, by hand, by its gradient, and on data made from one."""

from __future__ import annotations

import math

import pytest
import torch

from alignpro.objective.bradley_terry import fit_bradley_terry


def test_one_feature_by_hand():
    """Three pairs in four agree: without a penalty, sigmoid(w) = 3/4."""
    differences = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    assert fit_bradley_terry(differences, 1e-9).item() == pytest.approx(math.log(3), rel=1e-6)
    (w,) = fit_bradley_terry(differences, 0.1).tolist()
    # The derivative of the mean loss and the penalty: 3/4 - sigmoid(w) = 0.1 w.
    assert 0.75 - 1 / (1 + math.exp(-w)) == pytest.approx(0.1 * w, abs=1e-7)
    (flipped,) = fit_bradley_terry(-differences, 0.1).tolist()
    assert flipped == pytest.approx(-w, abs=1e-6)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_the_gradient_is_zero_where_it_ends(strength):
    d = torch.randn(40, 60, dtype=torch.float64, generator=torch.manual_seed(0))
    w = fit_bradley_terry(d, strength)
    gradient = -(d * torch.sigmoid(-(d @ w))[:, None]).mean(dim=0) + strength * w
    assert w.dtype == torch.float64 and gradient.abs().max() < 1e-6
    assert w.abs().max() > 1e-3


def test_pairs_that_a_line_tells_apart_have_a_finite_head():
    w = fit_bradley_terry(torch.ones(5, 1), 0.01).item()
    assert 1 / (1 + math.exp(w)) == pytest.approx(0.01 * w, rel=1e-4)


def test_a_head_is_found_again():
    generator = torch.manual_seed(3)
    true = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    d = torch.randn(20_000, 3, dtype=torch.float64, generator=generator)
    first = torch.rand(20_000, dtype=torch.float64, generator=generator) < torch.sigmoid(d @ true)
    found = fit_bradley_terry(torch.where(first[:, None], d, -d), 1e-6)
    # Standard errors of a logistic regression on so many pairs are 0.02 at most.
    torch.testing.assert_close(found, true, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("differences", "strength", "line"),
    [
        (torch.zeros(0, 3), 1.0, r"expected \[pairs, features\], got \(0, 3\)"),
        (torch.zeros(3), 1.0, r"expected \[pairs, features\], got \(3,\)"),
        (torch.tensor([[math.inf]]), 1.0, "finite numbers"),
        (torch.ones(1, 1), 0.0, "strength: expected a finite number above 0, got 0"),
    ],
)
def test_bad_input(differences, strength, line):
    with pytest.raises(ValueError, match=line):
        fit_bradley_terry(differences, strength)
