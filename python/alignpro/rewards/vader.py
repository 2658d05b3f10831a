"""Sentiment of the response by VADER: a rule-based lexicon, no model, no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignpro.optional import import_for
from alignpro.types import Texts


class VaderReward:
    """VADER's compound sentiment of each response, in [-1, 1]; 0 for an empty response.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text", ICWSM 2014. The prompt and the rewrite are not looked at.
    """

    name = "vader"

    def __init__(self) -> None:
        module = import_for("VaderReward", "vaderSentiment.vaderSentiment")
        self._analyzer = module.SentimentIntensityAnalyzer()

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in responses]
