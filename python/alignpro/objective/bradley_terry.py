"""A linear reward from pairs: Bradley and Terry's model of who is preferred.

``P(a over b) = sigmoid(r(a) - r(b))`` with ``r(a) = w . f(a)`` is a logistic regression on
differences of features, without an intercept, which a pair would cancel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

_ITERATIONS = 2000


def fit_bradley_terry(differences: Tensor, strength: float) -> Tensor:
    """The w [D] of least ``mean_i log(1 + exp(-w . d_i)) + strength / 2 |w|^2``, in float64.

    differences: [n, D], features of the chosen answer minus those of the rejected one.
    strength: of the penalty, above 0: pairs that some w tells apart have no least loss without.

    Strictly convex, so there is one; found by L-BFGS.

    Raises:
        ValueError: another shape, no pairs, values that are not finite, or strength out of range.
        RuntimeError: the gradient did not come down.
    """
    if differences.dim() != 2 or not differences.numel():
        raise ValueError(f"differences: expected [pairs, features], got {tuple(differences.shape)}")
    if not bool(torch.isfinite(differences).all()):
        raise ValueError("differences: expected finite numbers, got NaN or infinity")
    if not (math.isfinite(strength) and strength > 0):
        raise ValueError(f"strength: expected a finite number above 0, got {strength}")
    d = differences.double()
    w = torch.zeros(d.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = softplus(-(d @ w)).mean() + strength / 2 * w.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert w.grad is not None
    left = float(w.grad.abs().max())
    if left > 1e-5:
        raise RuntimeError(f"the fit did not converge: its gradient is {left:.3g}, expected 0")
    return w.detach()
