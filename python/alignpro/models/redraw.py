"""Whole sequences of a mixture by rejection: which draw is taken, and how the next is keyed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro.models.mixture import PreparedMixture
from alignpro.types import SamplingParams

if TYPE_CHECKING:
    from alignpro.native import core

_WHOLE: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def restriction(params: SamplingParams) -> tuple[str, Any] | None:
    """The first parameter, and what it would have to be, by which a draw is not one of the model's
    whole distribution; None: it is."""
    for name, whole in _WHOLE.items():
        if getattr(params, name) != whole:
            return name, whole
    return ("temperature", "above 0") if params.temperature == 0 else None


@dataclass
class Redraw:
    """One request for a whole sequence, through its tries.

    Draws and choices are keyed by (seed, sample, try): the first try is what token-wise sampling
    gives for the same request.
    """

    mixture: PreparedMixture
    tokens: list[int]
    params: SamplingParams  # with a seed
    sample: int
    tries: int = 1
    done: bool = False
    accepted: bool = False
    error: Exception | None = None
    best: core.Sequence_ | None = None
    best_logprob: float = -math.inf  # of its acceptance
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        found = restriction(self.params)
        if found is not None:
            name, expected = found
            raise ValueError(
                f"{name}: a mixture's sampling sequence accepts draws of the whole distribution: "
                f"expected {expected}, got {getattr(self.params, name)!r}; sampling token takes it"
            )

    def judge(self, sequence: core.Sequence_, log_density: float) -> None:
        """Accept a finished draw, whose sum_k w_k log rho_k is given, or not; sets ``done``."""
        log_acceptance = min(0.0, log_density - math.fsum(sequence.logprobs))
        if log_acceptance > self.best_logprob or self.best is None:
            self.best, self.best_logprob = sequence, log_acceptance
        key = (self.params.seed or 0, self.sample, self.tries)
        self.accepted = bool(np.random.default_rng(key).random() < math.exp(log_acceptance))
        if self.accepted:
            self.best, self.best_logprob = sequence, log_acceptance
        self.done = self.accepted or self.tries >= self.mixture.tries or self.left == 0

    @property
    def left(self) -> float | None:
        """Seconds of the request's deadline; None without."""
        limit = self.params.deadline_seconds
        return None if limit is None else max(0.0, limit - (time.monotonic() - self.began))

    def next_params(self) -> SamplingParams:
        """How the next try is drawn."""
        key = np.random.SeedSequence((self.params.seed or 0, self.tries))
        self.tries += 1
        seed, left = int(key.generate_state(1, np.uint64)[0]), self.left
        limit = None if left is None else max(left, 1e-6)
        return replace(self.params, seed=seed, deadline_seconds=limit)


class DrawCounts:
    """What came of a model's draws of whole sequences: tries, those that were accepted, requests
    whose tries gave out, and the mean probability with which a first try is accepted."""

    def __init__(self) -> None:
        self._tries = self._accepted = self._given_up = self._firsts = 0
        self._acceptance = 0.0  # of the first tries, which depend on no choice

    def add(self, judged: Sequence[Redraw]) -> None:
        for redraw in judged:
            self._tries += 1
            self._accepted += redraw.accepted
            self._given_up += redraw.done and not redraw.accepted
            if redraw.tries == 1:
                self._firsts += 1
                self._acceptance += math.exp(redraw.best_logprob)

    def stats(self) -> dict[str, int | float]:
        return {
            "sequence_tries": self._tries,
            "sequence_accepted": self._accepted,
            "sequence_given_up": self._given_up,
            "sequence_acceptance": self._acceptance / self._firsts if self._firsts else 0.0,
        }


def judge(model: core.Model, finished: Sequence[tuple[Redraw, core.Sequence_]]) -> None:
    """Judge finished draws, those of one mixture and temperature in one pass. What cannot be scored
    fails alone."""
    together: dict[Any, list[tuple[Redraw, core.Sequence_]]] = {}
    for redraw, sequence in finished:
        lanes = tuple((id(adapter), weight) for adapter, weight in redraw.mixture.lanes)
        key = (lanes, redraw.params.temperature)
        together.setdefault(key, []).append((redraw, sequence))
    for group in together.values():
        try:
            _judge(model, group)
        except Exception:
            for one in group:
                if one[0].done:
                    continue
                try:
                    _judge(model, [one])
                except Exception as error:  # its request's own
                    one[0].error, one[0].done = error, True


def _judge(model: core.Model, group: Sequence[tuple[Redraw, core.Sequence_]]) -> None:
    first = group[0][0]
    densities = first.mixture.sequence_logprobs(
        model,
        [redraw.tokens for redraw, _ in group],
        [sequence.tokens for _, sequence in group],
        first.params.temperature,
    )
    for (redraw, sequence), density in zip(group, densities, strict=True):
        redraw.judge(sequence, density)
