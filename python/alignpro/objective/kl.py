"""KL between policy and reference, per token and per rewrite.

Tensors are flat: the tokens of all sequences one after another, [T], beside ``sequence`` [T], the
index of the sequence that a token belongs to (non-decreasing; an index may be absent).
"""

from __future__ import annotations

import torch
from torch import Tensor


def future_kl(kl: Tensor, sequence: Tensor) -> Tensor:
    """``F_t = sum_{s>t} KL_s`` over the later tokens of the same sequence. Detached.

    kl: [T], nats. sequence: [T] integers. Returns [T]; the last token of a sequence has 0.
    It is the factor of ``grad log rho`` in the gradient of ``E sum_t KL_t`` (MATH: "KL"): a token
    is answerable for the states that follow it, and not for its own KL_t, which is an expectation
    over the choice at t. Each sequence is summed alone: its bits do not depend on the others.
    """
    rows, held = pad_sequences(kl.detach(), sequence)
    return next_token(rows).flip(1).cumsum(1).flip(1)[held]


def split_sequences(values: Tensor, sequence: Tensor) -> tuple[Tensor, ...]:
    """``values`` [T] cut into the sequences that have tokens, in order."""
    return torch.split(values, _lengths(values, sequence))


def pad_sequences(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [R, L], held [R, L] of bool): row r begins with the ``values`` [T] of the r-th sequence
    that has tokens, of which the longest has L, and ends in zeros. ``rows[held]`` are ``values``.
    """
    lengths = _lengths(values, sequence)
    position = torch.arange(max(lengths, default=0), device=values.device)
    held = position < torch.tensor(lengths, dtype=torch.long, device=values.device)[:, None]
    rows = values.new_zeros(held.shape)
    rows[held] = values
    return rows, held


def next_token(rows: Tensor) -> Tensor:
    """What the next token has, of rows [R, L] as `pad_sequences` makes them; 0 at their end."""
    return torch.nn.functional.pad(rows, (0, 1))[:, 1:]


def sum_per_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums of ``values`` [T] over each sequence: [num_sequences]; 0 where it has no tokens."""
    _lengths(values, sequence)
    if sequence.numel() and int(sequence[-1]) >= num_sequences:
        raise ValueError(
            f"sequence: expected indices below {num_sequences}, got {int(sequence[-1])}"
        )
    return values.new_zeros(num_sequences).index_add(0, sequence, values)


def k1(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """``log rho(a) - log rho_ref(a)`` of the sampled tokens: [T]. Unbiased for KL, may be negative.

    A diagnostic beside the exact KL (both agree in the mean); J. Schulman, "Approximating KL
    divergence", 2020.
    """
    return logprob - reference_logprob


def k3(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """``q/p - 1 - log(q/p)`` with p the policy, q the reference: [T]. Unbiased, never negative.

    A diagnostic; source as for ``k1``.
    """
    log_ratio = reference_logprob - logprob
    return torch.expm1(log_ratio) - log_ratio


def _lengths(values: Tensor, sequence: Tensor) -> list[int]:
    if values.dim() != 1 or sequence.shape != values.shape:
        raise ValueError(
            "expected aligned 1-D tensors, got values of shape "
            f"{tuple(values.shape)} and sequence of shape {tuple(sequence.shape)}"
        )
    if sequence.is_floating_point() or sequence.is_complex() or sequence.dtype == torch.bool:
        raise ValueError(f"sequence: expected integer indices, got {sequence.dtype}")
    if not sequence.numel():
        return []
    if bool((sequence[1:] < sequence[:-1]).any()) or int(sequence[0]) < 0:
        raise ValueError("sequence: expected non-negative, non-decreasing indices")
    _, counts = torch.unique_consecutive(sequence, return_counts=True)
    return [int(c) for c in counts]
