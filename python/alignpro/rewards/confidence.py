"""How likely the target finds what it wrote: the log-probabilities that came with the response."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

from alignpro.rewards.check import RESPONSE_LOGPROBS
from alignpro.types import AnswerScorer, Texts

_NEEDED = (
    "reward 'confidence': the target tells no log-probabilities of what it writes; "
    "target.client.logprobs=true asks an endpoint for them"
)


class ConfidenceReward:
    """log p(response | what the target read) in nats, under the distribution that it was drawn
    from: as recorded by the engine, so exact and without a computation of its own.

    per: "token" is the mean over the response's tokens, its end included; "response" is the sum,
    which falls with length.
    """

    name = "confidence"
    takes_response_logprobs = True

    def __init__(self, per: Literal["token", "response"] = "token") -> None:
        if per not in ("token", "response"):
            raise ValueError(f'per: expected "token" or "response", got {per!r}')
        self._per = per

    def use_scorer(self, scorer: AnswerScorer) -> None:
        """Refuse, before anything is drawn, a target that tells none."""
        if not scorer.tells_logprobs:
            raise ValueError(f"{_NEEDED}; it is {scorer.name}")

    def check_columns(self, names: Collection[str]) -> None:
        if RESPONSE_LOGPROBS not in names:
            raise ValueError(_NEEDED)

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        self.check_columns(columns)
        sums = [(math.fsum(row), len(row)) for row in columns[RESPONSE_LOGPROBS]]
        if self._per == "response":
            return [total for total, _ in sums]
        return [total / max(1, count) for total, count in sums]
