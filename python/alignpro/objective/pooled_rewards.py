"""What a rewrite earns, estimated from what the same text earned behind prompts like this one.

One response says little of ``R(x, x')``, and the optimum ``rho* = rho_ref exp(R / kl_coef) / Z``
asks for R itself: with noisy rewards its weights choose by the noise. Where prompts share their
rewrites, R can be estimated from all of them at once: a Gaussian process over (prompt, text)

    r(x, t) = mean + a_t + b(x) + c_t(x) + d_x + noise

with a, d independent per text and prompt, and b, c smooth in the prompt's features: their kernel is
``exp(-s (1 - cos(x, x')))``. The five variances and s are those of the largest marginal likelihood
(Rasmussen and Williams 2006, chapters 2 and 5). The estimate is biased towards the mean for few
observations and consistent for many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FITTED = 512  # observations that the six numbers are fitted to: time grows with their cube
_START = (-5.0, -4.0, -2.0, -4.0, -2.0, 1.7)  # logarithms: a, b, c, d, noise; s
_FLOOR = 1e-4  # of the noise: a Cholesky factor needs some


@dataclass(frozen=True)
class PooledRewards:
    mean: Tensor  # [P, T] float64: what text t is expected to earn behind prompt p
    text: float  # variances, in units of squared reward; see the module
    prompt_features: float
    text_by_features: float
    prompt: float
    noise: float
    sharpness: float  # s


def pooled_rewards(
    features: Tensor,
    prompt: Tensor,
    text: Tensor,
    rewards: Tensor,
    *,
    num_texts: int,
    iterations: int = 60,
) -> PooledRewards:
    """The posterior mean of the process at every pair of a prompt and a text.

    Args:
        features: [P, D], of the prompts; centred and normalised here.
        prompt, text: [n] integers, whom each observation belongs to. rewards: [n], one response's.
        num_texts: T. iterations: of Adam on the logarithms of the six numbers.

    Observations are few thousand at most: one factor of an n x n matrix is taken.

    Raises:
        ValueError: tensors that are not aligned, empty, out of range or not finite.
    """
    _check(features, prompt, text, rewards, num_texts)
    rewards = rewards.double()
    mean = rewards.mean()
    scale = rewards.std(correction=0).clamp_min(1e-6)  # the start is meant for rewards of spread 1
    y = (rewards - mean) / scale
    x = directions(features)
    cosine = x @ x.T

    logs = torch.tensor(_START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=0.3)
    few = torch.linspace(0, len(y) - 1, min(len(y), _FITTED)).long()
    part = _Observations(cosine, prompt[few], text[few])
    for _ in range(iterations):
        factor = torch.linalg.cholesky(part.covariance(logs))
        whitened = torch.linalg.solve_triangular(factor, y[few, None], upper=False)
        loss = 0.5 * whitened.square().sum() + factor.diagonal().log().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        factor = torch.linalg.cholesky(_Observations(cosine, prompt, text).covariance(logs))
        weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        a, b, c, d, noise, s = logs.exp()
        near = torch.exp(s * (cosine[:, prompt] - 1))  # [P, n]
        # The prompt's own effects, then the text's: sums over the observations of either.
        own = b * near @ weights
        own += d * torch.zeros(len(x), dtype=torch.float64).index_add_(0, prompt, weights)
        by_text = torch.zeros(len(x), num_texts, dtype=torch.float64)
        by_text.index_add_(1, text, (a + c * near) * weights)
        posterior = mean + scale * (own[:, None] + by_text)
        a, b, c, d, noise = (v * scale.square() for v in (a, b, c, d, noise))
    return PooledRewards(
        posterior,
        text=float(a),
        prompt_features=float(b),
        text_by_features=float(c),
        prompt=float(d),
        noise=float(noise),
        sharpness=float(s),
    )


def directions(features: Tensor) -> Tensor:
    """[P, D] float64: where each row lies from their mean, at length 1; 0 where it is the mean."""
    x = features.double() - features.double().mean(dim=0)
    return torch.as_tensor(x / x.norm(dim=1, keepdim=True).clamp_min(1e-12))


def principal(features: Tensor, axes: int) -> Tensor:
    """[P, min(axes, P, D)] float64: coordinates on the axes along which rows vary most."""
    x = features.double() - features.double().mean(dim=0)
    left, lengths, _ = torch.linalg.svd(x, full_matrices=False)
    return torch.as_tensor(left[:, :axes] * lengths[:axes])


class _Observations:
    """Which of them share a prompt or a text, and how alike their prompts are."""

    def __init__(self, cosine: Tensor, prompt: Tensor, text: Tensor) -> None:
        self.cosine = cosine[prompt][:, prompt]
        self.same_prompt = (prompt[:, None] == prompt).double()
        self.same_text = (text[:, None] == text).double()

    def covariance(self, logs: Tensor) -> Tensor:
        a, b, c, d, noise, s = logs.exp()
        near = torch.exp(s * (self.cosine - 1))
        covariance = self.same_text * (a + c * near) + b * near + d * self.same_prompt
        return torch.as_tensor(covariance + torch.diag((noise + _FLOOR).expand(len(near))))


def _check(features: Tensor, prompt: Tensor, text: Tensor, rewards: Tensor, num_texts: int) -> None:
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features: expected [prompts, size], got {tuple(features.shape)}")
    if not rewards.numel() or not prompt.shape == text.shape == rewards.shape == (len(rewards),):
        raise ValueError(
            "expected prompt, text and rewards of one shape [observations], got "
            f"{tuple(prompt.shape)}, {tuple(text.shape)} and {tuple(rewards.shape)}"
        )
    for name, index, count in (("prompt", prompt, len(features)), ("text", text, num_texts)):
        if not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"{name}: expected numbers in [0, {count}), got {index.tolist()[:8]}")
    if not bool(torch.isfinite(features).all()) or not bool(torch.isfinite(rewards).all()):
        raise ValueError("features and rewards: expected finite numbers, got NaN or infinity")
    if math.prod(rewards.shape) > 20_000:
        raise ValueError(f"rewards: expected at most 20000 observations, got {len(rewards)}")
