"""Every failure of a reward stops with an error that names the row; none becomes a zero."""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import pytest
import torch

from alignpro.rewards import from_callable
from alignpro.rewards.check import RewardError, check_columns, score_checked
from alignpro.rewards.combine import WeightedSum

PROMPTS = ["first prompt", "second prompt", "third prompt"]
REWRITES = ["r1", "r2", "r3"]
RESPONSES = ["a", "bb", "ccc"]


def check(reward, columns=None, prompts=PROMPTS, rewrites=REWRITES, responses=RESPONSES):
    return score_checked(reward, prompts, rewrites, responses, columns)


def lengths(prompts, rewrites, responses, **columns):
    return [len(r) for r in responses]


def test_scores_come_back_in_order_as_floats():
    scores = check(lengths)
    assert scores == [1.0, 2.0, 3.0]
    assert all(type(s) is float for s in scores)


def test_the_reward_sees_the_original_prompts_rewrites_and_columns():
    seen = {}

    def spy(prompts, rewrites, responses, **columns):
        seen.update(prompts=prompts, rewrites=rewrites, responses=responses, **columns)
        return [0.0] * len(prompts)

    check(spy, {"answer": [7, 8, 9]})
    assert seen == {
        "prompts": PROMPTS,
        "rewrites": REWRITES,
        "responses": RESPONSES,
        "answer": [7, 8, 9],
    }


def test_a_reward_may_work_on_the_lists_that_it_is_given():
    def lowers(prompts, rewrites, responses, answer):
        responses[:] = [r.upper() for r in responses]
        prompts.clear(), rewrites.clear(), answer.clear()
        return [0.0] * len(responses)

    seen = []

    def spy(prompts, rewrites, responses, answer):
        seen.append((prompts, rewrites, responses, answer))
        return [1.0] * len(responses)

    both = WeightedSum({"lowers": (1.0, from_callable(lowers)), "spy": (1.0, from_callable(spy))})
    columns = {"answer": [7, 8, 9]}
    assert check(both, columns) == [1.0] * 3
    assert seen == [(PROMPTS, REWRITES, RESPONSES, [7, 8, 9])] and columns == {"answer": [7, 8, 9]}


async def exits_later(responses, **columns):
    sys.exit(3)


@pytest.mark.parametrize("reward", [lambda responses, **columns: sys.exit(3), exits_later])
def test_an_exit_in_a_reward_is_its_error(reward):
    with pytest.raises(RewardError, match=r"raised RuntimeError .*: it exited, with status 3"):
        check(from_callable(reward, "leaves"))


@pytest.mark.parametrize("column", ["responses", "completion_ids", "completions"])
def test_a_column_called_as_an_argument_is_refused_before_anything_is_computed(column):
    def trl(completions, **columns):
        return [0.0] * len(completions)

    for reward in (from_callable(trl), WeightedSum({"trl": (1.0, from_callable(trl))})):
        with pytest.raises(ValueError, match=f"column '{column}' collides with a reward argument"):
            check_columns(reward, {column: []})


@pytest.mark.parametrize(
    "scores",
    [
        (1, 2, 3),
        [True, 2, np.float32(3)],
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        (x for x in (1, 2, 3)),
    ],
)
def test_any_sequence_of_numbers_is_accepted(scores):
    assert check(lambda *_, **__: scores) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (math.nan, "finite number, got nan; None is no score"),
        (math.inf, "finite number, got inf"),
        (-math.inf, "finite number, got -inf"),
        ("0.5", "a number, got str"),
        ([0.5], "a number, got list"),
        (np.array([0.5]), "a number, got ndarray"),
        (1j, "a number, got complex"),
        (10**400, "a number, got int"),
    ],
)
def test_a_value_that_is_no_score_names_its_row(bad, says):
    with pytest.raises(RewardError) as caught:
        check(lambda *_, **__: [1.0, bad, 1.0])
    assert caught.value.row == 1
    assert "row 1 (prompt 'second prompt')" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_raising_reward_names_the_offending_row_and_keeps_the_cause():
    def fails_on_bb(prompts, rewrites, responses, **columns):
        if "bb" in responses:
            raise KeyError("no judgement")
        return [0.0] * len(responses)

    with pytest.raises(
        RewardError, match=r"fails_on_bb.*KeyError.*row 1.*second.*no judgement"
    ) as e:
        check(fails_on_bb)
    assert e.value.row == 1
    assert isinstance(e.value.__cause__, KeyError)


def test_columns_follow_their_rows_when_the_offending_row_is_sought():
    def fails(prompts, rewrites, responses, *, answer):
        assert len(answer) == len(prompts)
        if 9 in answer:
            raise RuntimeError("nine")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError) as caught:
        check(fails, {"answer": [7, 8, 9]})
    assert caught.value.row == 2


def test_a_batch_that_fails_though_no_row_does():
    def too_many(prompts, rewrites, responses, **columns):
        if len(prompts) > 2:
            raise MemoryError("too many")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="batch of 3 rows, though on no row alone") as caught:
        check(too_many)
    assert caught.value.row is None
    assert isinstance(caught.value.__cause__, MemoryError)


def test_an_interrupt_is_not_swallowed():
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(interrupted)


def test_wrong_count_names_the_row_that_is_dropped():
    def skips_short(prompts, rewrites, responses, **columns):
        return [1.0 for r in responses if len(r) != 2]

    with pytest.raises(RewardError, match=r"expected 3 scores.*got 2; row 1 .*second") as caught:
        check(skips_short)
    assert caught.value.row == 1


def test_wrong_count_without_a_culprit():
    with pytest.raises(RewardError, match="expected 3 scores, one a row, got 1") as caught:
        check(lambda *_, **__: [1.0])
    assert caught.value.row is None


@pytest.mark.parametrize("result", [1.0, None, "123", {"a": 1.0}])
def test_a_result_that_is_no_sequence(result):
    with pytest.raises(RewardError, match="expected a sequence of numbers"):
        check(lambda *_, **__: result)


def test_an_awaitable_result_is_waited_for():
    async def later():
        return [0.5] * 3

    assert check(lambda *_, **__: later()) == [0.5] * 3


class Judged:
    """Fails as a judge does: after it was paid for two of three rows."""

    def __init__(self, seconds=0.0, **attributes):
        self.calls, self.seconds = 0, seconds
        vars(self).update(attributes)

    def __call__(self, prompts, rewrites, responses, **columns):
        self.calls += 1
        time.sleep(self.seconds)
        if "bb" in responses:
            raise KeyError("no judgement")
        return [0.0] * (len(responses) - 1)


async def later_judge(responses):
    ASKED.append(responses)
    raise KeyError("no judgement")


ASKED = []


def test_rows_that_cost_money_are_not_scored_again(monkeypatch):
    monkeypatch.setattr("alignpro.rewards.check._CHEAP_SECONDS", 0.05)
    for reward in (Judged(costs_money=True), Judged(seconds=0.06)):
        with pytest.raises(RewardError, match=r"KeyError on a batch of 3 rows: 'no judge") as e:
            check(reward)
        assert (e.value.row, reward.calls) == (None, 1)
        with pytest.raises(RewardError, match="expected 1 scores, one a row, got 0"):
            score_checked(reward, ["p"], ["r"], ["a"])
        assert reward.calls == 2
    with pytest.raises(RewardError, match="KeyError on a batch of 3 rows"):
        check(from_callable(later_judge))
    assert ASKED == [RESPONSES]

    def function(responses):
        raise KeyError("no judgement")

    function.costs_money = True
    assert from_callable(function).costs_money
    assert not from_callable(lambda responses: 0).costs_money


def test_no_rows_is_no_call():
    assert check(lambda *_, **__: 1 / 0, prompts=[], rewrites=[], responses=[]) == []


def test_inputs_that_are_not_aligned():
    with pytest.raises(ValueError, match="'responses': expected 3 rows as prompts, got 2"):
        check(lengths, responses=["a", "b"])
    with pytest.raises(ValueError, match="'answer': expected 3 rows as prompts, got 1"):
        check(lengths, {"answer": [1]})
    with pytest.raises(ValueError, match="column 'responses' collides"):
        check(lengths, {"responses": [1, 2, 3]})


def test_a_long_prompt_is_shortened_to_one_line():
    with pytest.raises(RewardError) as caught:
        check(lambda *_, **__: ["x"], prompts=["x\n" * 500], rewrites=[""], responses=[""])
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
