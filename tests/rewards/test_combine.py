"""Weighted sums: the total, the parts, and errors that name the part."""

from __future__ import annotations

import math

import pytest

from alignpro.rewards import (
    RewardError,
    VaderReward,
    WeightedSum,
    from_callable,
    score_checked,
    score_components,
)
from alignpro.rewards.combine import score_rollout
from alignpro.types import Response, Reward, Rewrite, Rollout

ROWS = (["p1", "p2"], ["r1", "r2"], ["x", "yyy"])


def length(prompts, rewrites, responses, **columns):
    return [len(r) for r in responses]


def seven(prompts, rewrites, responses, **columns):
    return [7.0] * len(prompts)


def test_the_sum_and_its_parts():
    total = WeightedSum({"length": (2.0, length), "seven": (-0.5, seven)})
    assert isinstance(total, Reward)
    assert list(total(*ROWS)) == [2 * 1 - 3.5, 2 * 3 - 3.5]
    assert total.components(*ROWS) == {"length": [1.0, 3.0], "seven": [7.0, 7.0]}
    assert total.total({"length": [0.0], "seven": [2.0]}) == [-1.0]
    assert total.name == "2*length+-0.5*seven"


def test_score_components_scores_once():
    calls = []

    def counted(prompts, rewrites, responses, **columns):
        calls.append(columns)
        return length(prompts, rewrites, responses)

    scores, parts = score_components(WeightedSum({"n": (3.0, counted)}), *ROWS, {"c": [1, 2]})
    assert (scores, parts) == ([3.0, 9.0], {"n": [1.0, 3.0]})
    assert calls == [{"c": [1, 2]}]


def test_score_components_of_a_single_reward():
    scores, parts = score_components(length, *ROWS)
    assert scores == [1.0, 3.0]
    assert parts == {"length": [1.0, 3.0]}


def test_an_error_names_the_part_and_the_row():
    def broken(prompts, rewrites, responses, **columns):
        return [0.0, math.nan][: len(prompts)]

    with pytest.raises(
        RewardError, match=r"in 'judge': reward 'broken', row 1 \(prompt 'p2'\)"
    ) as e:
        score_checked(WeightedSum({"length": (1.0, length), "judge": (1.0, broken)}), *ROWS)
    assert e.value.row == 1


def test_a_part_that_abstains_leaves_the_others():
    def some(completions, task):
        return [
            None if t == "code" else float(len(c)) for c, t in zip(completions, task, strict=True)
        ]

    some = from_callable(some)
    rows = (["p", "q"], ["", ""], ["abc", "de"], {"task": ["code", "math"]})
    parts = {"some": (2.0, some), "length": (1.0, from_callable(lambda responses: [1.0, 1.0]))}
    scores, components = score_components(WeightedSum(parts), *rows)
    assert scores == [1.0, 5.0]
    assert math.isnan(components["some"][0]) and components["some"][1] == 2.0
    for alone in (some, WeightedSum({"some": (1.0, some)})):
        for given in (score_checked(alone, *rows), score_components(alone, *rows)[0]):
            assert math.isnan(given[0]) and given[1] == 2.0


def test_a_rollout_without_what_got_no_score():
    def of_task(responses, task):
        return [
            None if t == "code" else float(len(r)) for r, t in zip(responses, task, strict=True)
        ]

    responses = [Response([1], text, [0.0], "stop") for text in ("a", "bb", "ccc")]
    rewrites = [
        [Rewrite(0, [], [1], [0.0], "x", "p", [1], "stop", responses[:2])],
        [Rewrite(1, [], [1], [0.0], "x", "q", [1], "stop", responses[2:])],
    ]
    rollout = Rollout(["p", "q"], rewrites, {}, 0)
    scores = score_rollout(from_callable(of_task), rollout, {"task": ["math", "code"]})
    assert scores.rewards == [[1.0, 2.0], []]
    assert scores.components == {"of_task": [1.0, 2.0]}
    assert [len(group[0].responses) for group in scores.rollout.rewrites] == [2, 0]
    assert scores.rollout.unscored == 1 and len(rewrites[1][0].responses) == 1


def test_bad_terms_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum({})
    with pytest.raises(ValueError, match="'vader': expected a finite weight, got nan"):
        WeightedSum({"vader": (math.nan, VaderReward())})
    with pytest.raises(TypeError, match="'x': expected a callable, got int"):
        WeightedSum({"x": (1.0, 3)})
