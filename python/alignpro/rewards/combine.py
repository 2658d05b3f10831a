"""A weighted sum of rewards whose parts stay visible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple, Protocol, runtime_checkable

from alignpro.rewards.check import (
    RewardError,
    Unread,
    check_required,
    offer_scorer,
    response_columns,
    reward_inputs,
    reward_name,
    rewards_unread_by,
    score_checked,
)
from alignpro.types import AnswerScorer, Prompt, Reward, Rollout, SamplingParams, Texts


@runtime_checkable
class Composed(Reward, Protocol):
    """A reward whose parts stay visible: checked scores by name, and the score that they make."""

    def components(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> dict[str, list[float]]: ...

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]: ...


class WeightedSum:
    """``sum_k weight_k * reward_k``. Every part is checked by itself, so an error names the part.

    ``terms``: name -> (weight, reward), e.g. ``{"vader": (1.0, VaderReward())}``.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Reward]]) -> None:
        if not terms:
            raise ValueError("a weighted sum needs at least one reward, got none")
        for name, (weight, reward) in terms.items():
            if not math.isfinite(weight):
                raise ValueError(f"reward {name!r}: expected a finite weight, got {weight}")
            if not callable(reward):
                raise TypeError(
                    f"reward {name!r}: expected a callable, got {type(reward).__name__}"
                )
        self.terms = dict(terms)
        self.name = "+".join(n if w == 1 else f"{w:g}*{n}" for n, (w, _) in self.terms.items())

    def components(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> dict[str, list[float]]:
        """Scores of every part, unweighted: name -> [rows]; NaN where a part gave none (None)."""
        scores: dict[str, list[float]] = {}
        for name, (_, reward) in self.terms.items():
            try:
                scores[name] = score_checked(reward, prompts, rewrites, responses, columns)
            except RewardError as error:
                if reward_name(reward) == name:
                    raise
                raise RewardError(f"in {name!r}: {error}", error.row) from error.__cause__
        return scores

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of what ``components`` returned: [rows]. Nothing is scored again. A part
        without a score adds nothing; NaN where none has one."""
        parts = [[weight * s for s in components[name]] for name, (weight, _) in self.terms.items()]
        totals = []
        for scores in zip(*parts, strict=True):
            given = [score for score in scores if not math.isnan(score)]
            totals.append(sum(given) if given else math.nan)
        return totals

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float | None]:
        totals = self.total(self.components(prompts, rewrites, responses, **columns))
        return [None if math.isnan(total) else total for total in totals]

    takes_completion_ids = takes_response_logprobs = True  # each part says so itself

    def use_scorer(self, scorer: AnswerScorer) -> None:
        """Every part that asks for one is given it."""
        for _, reward in self.terms.values():
            offer_scorer(reward, scorer)

    def unread_by(self, params: SamplingParams) -> Unread:
        """As `rewards_unread_by`, of the parts."""
        return rewards_unread_by((reward for _, reward in self.terms.values()), params)

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """As `FunctionReward.check_columns`, of every part."""
        for _, reward in self.terms.values():
            check_required(reward, columns)


def score_components(
    reward: Reward,
    prompts: Sequence[Prompt],
    rewrites: Texts,
    responses: Texts,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[float], dict[str, list[float]]]:
    """Checked scores [rows], NaN where there is none, and, for reports, their unweighted parts by
    name; scores once.

    A reward without ``components`` and ``total`` is its own single part.
    """
    if isinstance(reward, Composed):
        texts, given = reward_inputs(prompts, columns)
        parts = reward.components(texts, rewrites, responses, **given)
        return reward.total(parts), parts
    scores = score_checked(reward, prompts, rewrites, responses, columns)
    return scores, {reward_name(reward): scores}


class Scores(NamedTuple):
    """A rollout's rewards, its rows in the order of prompt, rewrite and response."""

    rollout: Rollout  # without the responses that got no score
    rewards: list[list[float]]  # [prompts][responses]
    components: dict[str, list[float]]  # [rows], unweighted
    paid: frozenset[str]  # the components whose weight is above 0


def score_rollout(
    reward: Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]] | None = None
) -> Scores:
    """``columns``: more of the prompts' data, each aligned with ``rollout.prompts``."""
    rows = [
        (index, rewrite.text, response)
        for index, group in enumerate(rollout.rewrites)
        for rewrite in group
        for response in rewrite.responses
    ]
    of_rows = {
        name: [values[index] for index, _, _ in rows] for name, values in (columns or {}).items()
    }
    scores, components = score_components(
        reward,
        [rollout.prompts[index] for index, _, _ in rows],
        [text for _, text, _ in rows],
        [response.text for _, _, response in rows],
        of_rows | response_columns([response for _, _, response in rows]),
    )
    rewards: list[list[float]] = [[] for _ in rollout.prompts]
    for (index, _, _), score in zip(rows, scores, strict=True):
        if not math.isnan(score):
            rewards[index].append(score)
    scored = [not math.isnan(score) for score in scores]
    components = {name: list(compress(values, scored)) for name, values in components.items()}
    weights = {name: weight for name, (weight, _) in getattr(reward, "terms", {}).items()}
    paid = frozenset(name for name in components if weights.get(name, 1.0) > 0)
    return Scores(_with_scores(rollout, scored), rewards, components, paid)


def _with_scores(rollout: Rollout, scored: Sequence[bool]) -> Rollout:
    """Without the responses that got none, which are counted. scored: by row."""
    if all(scored):
        return rollout
    has_score = iter(scored)
    rewrites = [
        [replace(w, responses=[r for r in w.responses if next(has_score)]) for w in group]
        for group in rollout.rewrites
    ]
    return replace(rollout, rewrites=rewrites, unscored=rollout.unscored + scored.count(False))
