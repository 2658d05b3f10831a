"""Direct preference optimisation: a loss of pairs whose optimum is the KL-regularised one.

``pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta)`` makes ``beta log(pi*/pi_ref)`` the reward up to a
constant a prompt, which cancels between two answers to it (Rafailov et al. 2023, arXiv 2305.18290).
It cancels as well where the reference reads another prompt than the policy, pi_ref(y|x_s): E-DPO
(Su et al. 2024, arXiv 2408.01420) is this loss with such log-probabilities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceResult(NamedTuple):
    """Per pair, [P] float64."""

    loss: Tensor
    chosen_reward: Tensor  # beta (log pi - log pi_ref)
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward

    @property
    def correct(self) -> Tensor:
        """1 where the chosen answer has the higher reward, 1/2 where both have the same."""
        return (self.margin.sign() + 1) / 2


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceResult:
    """``-(1 - e) log sigmoid(m) - e log sigmoid(-m)`` of the margin m of each pair's rewards.

    Args:
        chosen, rejected: [P], log pi of whole answers, differentiable.
        reference_chosen, reference_rejected: [P], log pi_ref of the same answers, constants; read
            behind whatever the reference is given to read.
        beta: the weight of the KL penalty whose optimum is fitted.
        label_smoothing: e, the share of pairs that are taken to be the wrong way round; the margin
            then has a finite optimum, log((1 - e) / e).

    The gradient by m is ``e - sigmoid(-m)``: a pair that is told apart already teaches little.

    Raises:
        ValueError: shapes that differ, values that are not finite, beta or label_smoothing out of
            range.
    """
    given = (chosen, rejected, reference_chosen, reference_rejected)
    if chosen.dim() != 1 or any(values.shape != chosen.shape for values in given):
        shapes = ", ".join(str(tuple(values.shape)) for values in given)
        raise ValueError(f"expected log-probabilities of one shape [pairs], got {shapes}")
    if not all(bool(torch.isfinite(values).all()) for values in given):
        raise ValueError("log-probabilities: expected finite numbers, got NaN or infinity")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: expected a finite number above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected at least 0 and below 0.5, got {label_smoothing}"
        )
    chosen_reward = beta * (chosen.double() - reference_chosen.detach().double())
    rejected_reward = beta * (rejected.double() - reference_rejected.detach().double())
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PreferenceResult(loss, chosen_reward, rejected_reward)
