"""VADER and the topic share on text whose score can be seen by eye."""

from __future__ import annotations

import sys

import pytest

from alignpro.rewards import TopicReward, VaderReward


def vader(*responses: str) -> list[float]:
    blank = [""] * len(responses)
    return list(VaderReward()(blank, blank, responses))


def topic(prompt: str, response: str, rewrite: str = "") -> float:
    (score,) = TopicReward()([prompt], [rewrite], [response])
    return score


def test_vader_orders_sentiment_within_its_bounds():
    bad, neutral, good = vader("This is horrible.", "The table has legs.", "I love it, great!")
    assert -1 <= bad < -0.3
    assert neutral == 0.0
    assert 0.5 < good <= 1


def test_vader_scores_an_empty_response_zero():
    assert vader("") == [0.0]


def test_vader_looks_at_the_response_alone():
    (score,) = VaderReward()(["I hate this."], ["terrible"], ["wonderful"])
    assert score == vader("wonderful")[0] > 0


def test_topic_is_the_share_of_content_words():
    prompt = "How do I bake bread without yeast?"  # bake, bread, yeast
    assert topic(prompt, "Baking is fun.") == pytest.approx(1 / 3)
    assert topic(prompt, "Bread needs no yeast to be baked.") == 1.0
    assert topic(prompt, "What a lovely day!") == 0.0
    assert topic(prompt, "") == 0.0


def test_topic_counts_a_repeated_word_once():
    assert topic("bread, bread and more bread; butter", "bread bread") == 0.5


def test_topic_takes_the_prompt_not_the_rewrite():
    assert topic("Plant a tree", "cars cars", rewrite="cars") == 0.0


def test_topic_without_content_words_is_one():
    assert topic("Why not?", "Because.") == 1.0
    assert topic("?!", "") == 1.0


def test_topic_handles_apostrophes_case_and_other_scripts():
    assert topic("Feed the neighbour\u2019s DOG", "Neighbours feed dogs") == 1.0
    assert topic("\u00c9t\u00e9 42", "\u00e9t\u00e9 in 42 days") == 1.0


@pytest.mark.parametrize(
    ("reward", "module"),
    [(VaderReward, "vaderSentiment.vaderSentiment"), (TopicReward, "snowballstemmer")],
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, reward, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{reward.__name__} needs.*pip install 'alignpro\[train\]'"
    ):
        reward()
