"""Plain functions as rewards: our signature, TRL's, and what is refused."""

from __future__ import annotations

import functools

import pytest

from alignpro.rewards import RewardError, from_callable, score_checked

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

    with pytest.raises(
        RewardError, match=r"needs the data column 'answer'; columns here: \['other'\]"
    ):
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
        return [None] * len(responses)

    assert from_callable(my_reward).name == "my_reward"
    with pytest.raises(RewardError, match="'other name', row 0"):
        score_checked(from_callable(my_reward, "other name"), PROMPTS, REWRITES, RESPONSES)


class AsyncCall:
    async def __call__(self, prompts, rewrites, responses):
        return [0.0]


async def async_function(prompts, rewrites, responses):
    return [0.0]


@pytest.mark.parametrize("function", [async_function, AsyncCall()])
def test_async_is_refused_with_the_remedy(function):
    with pytest.raises(TypeError, match=r"is async.*asyncio\.run"):
        from_callable(function)


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


def test_what_trl_gives_beside_text_is_refused_by_name():
    def chat(completions):
        return [float(len(c[0]["content"])) for c in completions]

    def ids(completions, completion_ids):
        return [0.0 for _ in completions]

    with pytest.raises(TypeError, match=r"completions are plain text here.*in the argument conver"):
        from_callable(chat)(["p"], ["r"], ["y"])
    with pytest.raises(ValueError, match=r"completion_ids, which are not passed.*in completions"):
        from_callable(ids)(["p"], ["r"], ["y"])
