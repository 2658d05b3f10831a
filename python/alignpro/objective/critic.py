"""A baseline for every token: generalised advantages from a value head, and the head's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro.objective.kl import next_token, pad_sequences


def gae(
    rewards: Tensor,
    kl: Tensor,
    values: Tensor,
    sequence: Tensor,
    *,
    kl_coef: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of tokens. Schulman et al. 2016 (arXiv 1506.02438), gamma 1.

    The return of token t is ``R_i - kl_coef * sum_{s>t} KL_s``: the reward at the end, and the
    exact KL of the states that the token leads to, not of its own (MATH: "KL"). As rewards by
    token: ``r_t = -kl_coef * KL_{t+1}``, and R_i at the last. With V_t the value of the state that
    token t is chosen in, and 0 beyond the end,

        delta_t = r_t + V_{t+1} - V_t        A_t = sum_{l >= 0} gae_lambda^l delta_{t+l}

    gae_lambda 1 gives ``return - V_t``, unbiased whatever V is; below 1 trusts V for less variance.

    Args:
        rewards: [S], one per rewrite. kl, values: [T]. sequence: [T] integers, as for `future_kl`.

    Returns:
        (advantages [T], targets [T] = advantages + values), detached.

    Raises:
        ValueError: tensors that are not aligned, or gae_lambda outside [0, 1].
    """
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"gae_lambda: expected a number in [0, 1], got {gae_lambda}")
    if sequence.numel() and int(sequence[-1]) >= rewards.numel():
        raise ValueError(
            f"rewards: expected one of every sequence below {int(sequence[-1]) + 1}, "
            f"got {rewards.numel()}"
        )
    kl, values = kl.detach(), values.detach()
    value, held = pad_sequences(values, sequence)
    earned = -kl_coef * next_token(pad_sequences(kl, sequence)[0])
    # The last token of a row earns its reward in place of a later KL, which is 0 there.
    earned[held & ~next_token(held)] = rewards.detach()[torch.unique_consecutive(sequence)].to(kl)
    delta = earned + next_token(value) - value
    advantage = torch.zeros_like(delta)
    running = delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gae_lambda * running
        advantage[:, t] = running
    flat = advantage[held]
    return flat, flat + values


def value_loss(values: Tensor, targets: Tensor, *, total_tokens: int) -> Tensor:
    """``1/2 sum_t (V_t - target_t)^2 / total_tokens``: scalar, differentiable by ``values`` [T].

    total_tokens: of the whole optimiser step, so that micro-batches add up to one batch.
    """
    if values.shape != targets.shape:
        raise ValueError(f"values {tuple(values.shape)}: targets are {tuple(targets.shape)}")
    return 0.5 * (values - targets.detach()).square().sum() / total_tokens
