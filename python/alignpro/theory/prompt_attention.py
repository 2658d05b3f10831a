"""What a prompt does to attention, in a model small enough to solve.

    f(X) = w^T X^T softmax(X q)

for the tokens X [T, d] of an input, with a prompt q that says which of them matter and a head w. An
input has a label y = +1 or -1; a share zeta of its tokens is relevant, x_t = q* + y w*, and the
others are noise, x_t ~ N(0, sigma^2 I); q* and w* are perpendicular. The model is that of Oymak,
Rawat, Soltanolkotabi and Thrampoulidis 2023 (arXiv 2306.03435); the formulas here are derived for
this data and the loss 1/2 E (y - f)^2, those marked "many tokens" as T grows. With Q = |q*|, W =
|w*| and the prompt kappa q*, a prompt can be too sharp: beyond kappa = 1 / (2 sigma^2) what it
gains on relevant tokens it loses to the few others that are like them by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from alignpro.statistics import Floats

_AT_ONCE = 1 << 20  # drawn tokens; bounds memory
_MOST_RELEVANT = 50  # standard deviations; a float holds no gain beyond them


@dataclass(frozen=True)
class AttentionData:
    """The distribution of inputs and labels. Raises ValueError for sizes that it cannot have."""

    tokens: int = 20  # T
    relevant: int = 4  # of the tokens
    dimension: int = 8  # d; q* is its first axis and w* its second
    relevance: float = 1.5  # Q, the length of q*
    signal: float = 1.0  # W, the length of w*
    noise: float = 1.0  # sigma

    def __post_init__(self) -> None:
        if not 1 <= self.relevant < self.tokens:
            raise ValueError(
                f"relevant: expected 1 or more, below tokens ({self.tokens}), got {self.relevant}"
            )
        if self.dimension < 2:
            raise ValueError(f"dimension: expected 2 or more, got {self.dimension}")
        for name in ("relevance", "signal", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not self.relevance <= _MOST_RELEVANT * self.noise:  # the best gain is exp(Q^2 / 4)
            raise ValueError(
                f"relevance: expected at most {_MOST_RELEVANT} times noise, {self.noise}, got "
                f"{self.relevance}"
            )

    @property
    def share(self) -> float:
        """zeta."""
        return self.relevant / self.tokens

    @property
    def direction(self) -> Floats:
        """q*, [d]."""
        return _along(0, self.relevance, self.dimension)

    @property
    def label_direction(self) -> Floats:
        """w*, [d]."""
        return _along(1, self.signal, self.dimension)

    def draw(self, inputs: int, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Tokens [inputs, T, d], the relevant ones first, and labels [inputs]."""
        labels = random.choice([-1.0, 1.0], inputs)
        drawn = self.noise * random.standard_normal((inputs, self.tokens, self.dimension))
        relevant = self.direction + labels[:, None] * self.label_direction
        drawn[:, : self.relevant] = relevant[:, None, :]
        return drawn, labels

    def head_gradient(self) -> Floats:
        """-dL/dw at w = 0 and any prompt of 0, [d]: zeta w*."""
        return self.share * self.label_direction

    def prompt_gradient(self, c: float) -> Floats:
        """-dL/dq at w = c w* and q = 0, [d]: along q* exactly, whatever T."""
        zeta, squared = self.share, self.signal**2
        left = 1 - c * (zeta * squared - self.noise**2 / self.tokens)
        return c * squared * zeta * (1 - zeta) * left * self.direction

    def relevant_mass(self, kappa: float) -> float:
        """The share of attention that relevant tokens get under kappa q*; many tokens."""
        spread = (kappa * self.noise * self.relevance) ** 2 / 2
        of_noise = math.exp(min(700.0, spread - kappa * self.relevance**2))
        return self.share / (self.share + (1 - self.share) * of_noise)

    def gain(self, kappa: float) -> float:
        """How many times the signal-to-noise ratio of no prompt kappa q* has; many tokens. Largest
        at kappa = 1 / (2 sigma^2), where it is exp(Q^2 / (4 sigma^2))."""
        squared = self.relevance**2
        return math.exp(kappa * squared - (kappa * self.noise) ** 2 * squared)

    def error(self, kappa: float) -> float:
        """The probability that the sign of f is not the label under kappa q* and w along w*; many
        tokens, and exp((kappa sigma Q)^2) far below T."""
        ratio = self.share * self.signal * math.sqrt(self.tokens)
        ratio /= self.noise * math.sqrt(1 - self.share)
        return NormalDist().cdf(-self.gain(kappa) * ratio)

    @property
    def best_kappa(self) -> float:
        return 1 / (2 * self.noise**2)


def _along(axis: int, length: float, dimension: int) -> Floats:
    vector = np.zeros(dimension)
    vector[axis] = length
    return vector


def learned_head_error(data: AttentionData, kappa: float, samples: int) -> float:
    """The error of a head that one step learns from ``samples`` inputs, the mean of y times what
    attention returns under kappa q*; many tokens, and samples enough for a normal distribution.

    What attention returns is (A W) y along w*, B along q* whatever the label, and noise of
    standard deviation s a coordinate, with A the relevant mass. B costs more samples than the
    noise does: unless the labels in them are in balance, the head has learned B times their mean.
    Raises ValueError for samples below 1.
    """
    if samples < 1:
        raise ValueError(f"samples: expected 1 or more, got {samples}")
    mass, sharpness = data.relevant_mass(kappa), (kappa * data.noise * data.relevance) ** 2
    signal = (mass * data.signal) ** 2
    constant = (mass + (1 - mass) * kappa * data.noise**2) ** 2 * data.relevance**2
    of_noise = data.tokens - data.relevant
    noise = (data.noise * (1 - mass)) ** 2 * math.exp(min(700.0, sharpness)) / of_noise
    spread = noise * signal * (1 + 1 / samples) + (constant + noise) ** 2 / samples
    spread += (data.dimension - 1) * noise**2 / samples
    return NormalDist().cdf(-signal / math.sqrt(spread))


def attend(tokens: ArrayLike, prompt: ArrayLike) -> tuple[Floats, Floats]:
    """What attention returns, [n, d], and its weights, [n, T]: tokens [n, T, d], prompt [d]."""
    x = np.asarray(tokens, np.float64)
    scores = x @ np.asarray(prompt, np.float64)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nt,ntd->nd", weights, x), weights


def gradients(
    tokens: ArrayLike, labels: ArrayLike, head: ArrayLike, prompt: ArrayLike
) -> tuple[Floats, Floats]:
    """-dL/dw and -dL/dq of the inputs' mean of 1/2 (y - f)^2, [d] each."""
    x = np.asarray(tokens, np.float64)
    returned, weights = attend(x, prompt)
    head = np.asarray(head, np.float64)
    residual = np.asarray(labels, np.float64) - returned @ head
    of_values = np.einsum("nt,ntd,nt->nd", weights, x, x @ head)
    by_prompt = of_values - returned * (returned @ head)[:, None]
    return residual @ returned / len(x), residual @ by_prompt / len(x)


@dataclass(frozen=True)
class Measured:
    """Of a prompt and a head."""

    mass: float  # of attention, on relevant tokens
    error: float  # an f of 0 counts half


def measure(
    data: AttentionData,
    head: ArrayLike,
    prompt: ArrayLike,
    *,
    inputs: int,
    random: np.random.Generator,
) -> Measured:
    """Attention and errors of w and q on fresh inputs."""
    mass, wrong, left = 0.0, 0.0, inputs
    most = max(1, _AT_ONCE // (data.tokens * data.dimension))
    while left > 0:
        x, labels = data.draw(min(left, most), random)
        returned, weights = attend(x, prompt)
        margin = labels * (returned @ np.asarray(head, np.float64))
        mass += float(weights[:, : data.relevant].sum())
        wrong += float((margin < 0).sum()) + 0.5 * float((margin == 0).sum())
        left -= len(labels)
    return Measured(mass / inputs, wrong / inputs)


@dataclass(frozen=True)
class SharpnessPoint:
    """What kappa q* does with a head along w*: `AttentionData`'s formulas, and drawn inputs."""

    kappa: float
    predicted: Measured
    measured: Measured


def at_sharpness(
    data: AttentionData, kappa: float, *, inputs: int, random: np.random.Generator
) -> SharpnessPoint:
    prompt = kappa * data.direction
    predicted = Measured(data.relevant_mass(kappa), data.error(kappa))
    found = measure(data, data.label_direction, prompt, inputs=inputs, random=random)
    return SharpnessPoint(kappa, predicted, found)


@dataclass(frozen=True)
class Step:
    """After a gradient step."""

    taken: str  # "head" or "prompt"
    head: Floats  # w, [d]
    prompt: Floats  # q, [d]


def three_steps(
    data: AttentionData, *, inputs: int, head_rate: float, prompt_rate: float, seed: int = 0
) -> list[Step]:
    """w and q from 0 by gradient steps, each on ``inputs`` fresh inputs: the head finds the label,
    the prompt what is relevant, and the head learns again from what the prompt looks at."""
    random = np.random.default_rng(seed)
    head, prompt = np.zeros(data.dimension), np.zeros(data.dimension)
    steps = []
    for taken in ("head", "prompt", "head"):
        by_head, by_prompt = gradients(*data.draw(inputs, random), head, prompt)
        if taken == "head":
            head = head + head_rate * by_head
        else:
            prompt = prompt + prompt_rate * by_prompt
        steps.append(Step(taken, head, prompt))
    return steps
