"""Plain functions as rewards: our signature, TRL's, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import math

import pytest

from alignpro.rewards import RewardError, WeightedSum, from_callable, score_checked
from alignpro.rewards.check import check_columns

PROMPTS, REWRITES, RESPONSES = ["p", "pp"], ["r", "rr"], ["xxx", "xxxx"]


def call(function, **columns):
    return score_checked(from_callable(function), PROMPTS, REWRITES, RESPONSES, columns)


def test_our_signature():
    def ours(prompts, rewrites, responses, **columns):
        return [
            len(p) + 10 * len(r) + 100 * len(y)
            for p, r, y in zip(prompts, rewrites, responses, strict=True)
        ]

    assert call(ours) == [311.0, 422.0]


def test_trl_signature_gets_responses_as_completions_and_the_columns():
    def trl(prompts, completions, **kwargs):
        assert set(kwargs) == {"answer"}
        return [float(a) + len(c) for c, a in zip(completions, kwargs["answer"], strict=True)]

    assert call(trl, answer=[10, 20]) == [13.0, 24.0]


def test_trl_signature_without_prompts():
    assert call(lambda completions, **kwargs: [len(c) for c in completions]) == [3.0, 4.0]


def test_without_kwargs_only_the_named_columns_are_passed():
    def named(responses, answer):
        return answer

    assert call(named, answer=[1, 2], other=["a", "b"]) == [1.0, 2.0]


def test_a_missing_column_is_named():
    def named(responses, answer):
        return answer

    with pytest.raises(RewardError, match=r"needs the data column 'answer'; columns here: other"):
        call(named, other=["a", "b"])


def test_a_column_with_a_default_may_be_missing():
    def named(responses, answer=None):
        assert answer is None
        return [0.0] * len(responses)

    assert call(named) == [0.0, 0.0]


def test_a_partial_and_an_object_work():
    class Length:
        def __call__(self, responses, *, scale=2):
            return [scale * len(r) for r in responses]

    assert call(Length()) == [6.0, 8.0]
    assert call(functools.partial(Length(), scale=3)) == [9.0, 12.0]


def test_names_for_errors():
    def my_reward(responses):
        return ["?"] * len(responses)

    assert from_callable(my_reward).name == "my_reward"
    with pytest.raises(RewardError, match="'other name', row 0"):
        score_checked(from_callable(my_reward, "other name"), PROMPTS, REWRITES, RESPONSES)


class LaterCall:
    async def __call__(self, responses):
        return [len(r) for r in responses]


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [len(c) for c in completions]


@pytest.mark.parametrize("function", [later, LaterCall(), functools.partial(later, extra=1)])
def test_async_functions_are_waited_for(function):
    assert call(function) == [3.0, 4.0]

    async def within():  # as in a notebook, whose loop is under way
        return call(function)

    assert asyncio.run(within()) == [3.0, 4.0]


def test_all_async_calls_share_a_loop():
    """A client of an endpoint belongs to the loop of its first call."""
    loops = []

    async def asked(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0 for _ in completions]

    assert call(asked) == call(asked) == [0.0, 0.0]
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda a, b: 0, r"takes \(a, b\)"),
        (lambda *args: 0, "no named parameter"),
        (lambda prompts, **columns: 0, r"takes \(prompts\)"),
        (lambda responses, completions: 0, "both responses and completions"),
        (lambda responses, /: 0, "'responses' is positional-only"),
        (dict.get, "reward"),
    ],
)
def test_other_signatures_are_refused(function, says):
    with pytest.raises(TypeError, match=says) as caught:
        from_callable(function)
    assert "expected (prompts, rewrites, responses, **columns) or TRL's" in str(caught.value)


def test_a_column_that_collides_with_an_argument():
    with pytest.raises(RewardError, match="column 'completions' collides"):
        call(lambda completions, **kwargs: [0.0, 0.0], completions=["a", "b"])


CHATS = [
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "p"}],
    [{"role": "user", "content": "pp"}],
]


def test_messages_where_the_data_are_messages():
    """As TRL: a conversational data set gives its functions messages, and ours their text."""

    def trl(prompts, completions, **kwargs):
        assert prompts == CHATS
        assert [[m["role"] for m in c] for c in completions] == [["assistant"]] * 2
        return indexed(prompts, completions)

    def ours(prompts, responses):
        return [len(p) + 10 * len(r) for p, r in zip(prompts, responses, strict=True)]

    assert call(trl, conversations=CHATS) == call(ours, conversations=CHATS) == [31.0, 42.0]


def indexed(prompts, completions, **kwargs):
    pairs = zip(prompts, completions, strict=True)
    return [len(p[-1]["content"]) + 10 * len(c[0]["content"]) for p, c in pairs]


def test_messages_for_a_function_that_asks_text_for_them():
    def got(completions):
        return [len(c[0].get("content")) for c in completions]

    async def later(completions):
        return [len(c[0]["content"]) for c in completions]

    assert call(indexed) == [31.0, 42.0]
    assert call(got) == call(later) == [3.0, 4.0]


def test_another_mistake_with_text_stays_what_it_is():
    def wrong(completions):
        return [c.no_such for c in completions]

    with pytest.raises(RewardError, match=r"row 0 .*'str' object has no attribute 'no_such'"):
        call(wrong)


def test_the_tokens_of_the_responses():
    def ids(completions, completion_ids):
        return [float(len(tokens)) for tokens in completion_ids]

    def any_of_trl(completions, **kwargs):
        return [float(sum(tokens)) for tokens in kwargs["completion_ids"]]

    def ours(responses, **columns):
        assert not columns
        return [0.0 for _ in responses]

    tokens = [[1, 2], [3, 4, 5]]
    assert call(ids, completion_ids=tokens) == [2.0, 3.0]
    assert call(any_of_trl, completion_ids=tokens) == [3.0, 12.0]
    assert call(ours, completion_ids=tokens) == [0.0, 0.0]
    weighted = WeightedSum({"ids": (2.0, from_callable(ids)), "ours": (1.0, from_callable(ours))})
    given = (PROMPTS, REWRITES, RESPONSES, {"completion_ids": tokens})
    assert score_checked(weighted, *given) == [4.0, 6.0]
    with pytest.raises(RewardError, match=r"takes completion_ids, which are not there: .*endpoint"):
        call(ids)


def test_what_only_trls_trainer_has_needs_a_default():
    def needs(completions, trainer_state):
        return [0.0]

    def may(completions, trainer_state=None, log_extra=None, log_metric=None):
        return [float(trainer_state is None) for _ in completions]

    with pytest.raises(TypeError, match=r"takes trainer_state, .*; give it a default"):
        from_callable(needs)
    assert call(may) == [1.0, 1.0]


def test_none_is_no_score():
    scores = call(lambda completions: [None, 2.0])
    assert math.isnan(scores[0]) and scores[1] == 2.0


def test_a_column_that_is_missing_is_known_before_any_response():
    def needs(completions, answer, conversations, completion_ids):
        return [0.0]

    reward = WeightedSum({"needs": (1.0, from_callable(needs))})
    check_columns(reward, {"answer": []})
    with pytest.raises(ValueError, match="needs the data column 'answer'"):
        check_columns(reward, {"question": []})
