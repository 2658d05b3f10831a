"""The rewards `confidence` and `grounding`: by the engine's own numbers, and through a pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.config import ModelConfig
from alignpro.models.answer_scores import TargetScorer, chunks
from alignpro.models.endpoint import EndpointModel
from alignpro.models.native_model import load_model
from alignpro.pipeline import Pipeline
from alignpro.rewards import build_reward, from_callable
from alignpro.rewards.check import (
    check_columns,
    offer_scorer,
    rewards_unread_by,
    score_checked,
)
from alignpro.rewards.combine import score_rollout
from alignpro.rewards.grounding import with_and_without
from alignpro.types import Conversation, SamplingParams
from chat_server import ChatServer, Fault
from native_runs import lora

SHORT = SamplingParams(max_new_tokens=8, temperature=0.8)
PROMPTS = ["tin roof. say it", "the rain", "say it"]
COLUMNS = {"source": ["tin roof.", "a heron", None]}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


def test_confidence_is_what_the_engine_recorded(model):
    for per in ("token", "response"):
        pipeline = Pipeline(None, model, build_reward(f"confidence#{per}"))
        rollout = Pipeline.respond(pipeline, PROMPTS, seed=3)
        for (rewrite,) in rollout.rewrites:
            (response,) = rewrite.responses
            expected = np.sum(response.logprobs) / (len(response.tokens) if per == "token" else 1)
            assert response.reward == pytest.approx(expected, rel=1e-12) and expected < 0


def test_confidence_as_a_term_and_as_a_column_of_a_function(model):
    def total(responses, response_logprobs):
        return [sum(row) for row in response_logprobs]

    reward = build_reward("2*confidence+chair")
    pipeline = Pipeline(None, model, reward, response_params=SHORT)
    columns = {"objects": [["dog"]] * 3}
    rollout = pipeline.respond(PROMPTS, seed=3, columns=columns)
    scores = score_rollout(reward, rollout, columns)
    for index, ((rewrite,), own) in enumerate(
        zip(rollout.rewrites, scores.components["confidence"], strict=True)
    ):
        (response,) = rewrite.responses
        assert own == math.fsum(response.logprobs) / len(response.logprobs)
        assert scores.rewards[index] == [2 * own + scores.components["chair"][index]]
    function = from_callable(total)
    check_columns(function, {})
    scored = Pipeline(None, model, function, response_params=SHORT).respond(PROMPTS, seed=3)
    for (rewrite,) in scored.rewrites:
        assert rewrite.responses[0].reward == sum(rewrite.responses[0].logprobs)


def test_grounding_is_two_scores_under_the_frozen_base(model):
    """By hand, with an adapter on the target that must not count."""
    pipeline = Pipeline(
        *(None, model, build_reward("grounding")),
        response_params=SHORT,
        target_adapter=lora(model, seed=4),
    )
    rollout = pipeline.respond(PROMPTS, seed=3, columns=COLUMNS)
    read = [
        ("tin roof. say it", "say it"),
        ("a heron\n\nthe rain", "the rain"),
        ("say it", ""),
    ]
    tokenizer = model.tokenizer

    def mean(prompt, text):
        begin = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        written = tokenizer.encode(text.strip())
        (values,) = model.score([[*begin, *written]])
        return float(values[len(begin) - 1 :].astype(np.float64).mean()) if written else 0.0

    found = []
    for (rewrite,), (with_source, without) in zip(rollout.rewrites, read, strict=True):
        text = rewrite.responses[0].text
        found.append(rewrite.responses[0].reward)
        expected = mean(with_source, text) - mean(without, text)
        assert found[-1] == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 6) for value in found}) == 3


def test_what_is_read_with_and_without_the_source():
    turns = (("system", "be brief"),)
    asked = Conversation(turns, "A heron. Say it.")
    with_source, without = with_and_without(asked, "A heron.")
    assert with_source == asked and without == Conversation(turns, "Say it.")
    assert with_and_without(Conversation.of("A heron."), "A heron.") == ("A heron.", None)
    assert with_and_without(Conversation.of("Say it."), None) == ("Say it.", None)
    added, plain = with_and_without(asked, "A roof.")
    assert added == Conversation(turns, "A roof.\n\nA heron. Say it.") and plain == asked


def test_the_share_of_words_that_the_source_holds():
    reward = build_reward("grounding#words")
    sources = ["Two dogs and a ball", " \n", "x"]
    prompts, responses = ["?", "a tall tree", "?"], ["The dog has a red ball.", "Trees", "It is"]
    found = score_checked(reward, prompts, [""] * 3, responses, {"source": sources})
    assert found == [pytest.approx(2 / 3), 1.0, 0.0]
    with pytest.raises(ValueError, match="column 'source', row 0: expected text, got int"):
        reward(["?"], [""], ["a"], source=[3])


def test_a_target_that_cannot_tell_is_refused_in_a_line(tiny_model_dir):
    with ChatServer(lambda asked: Fault.reply("good")) as server:
        silent = EndpointModel(ModelConfig("big", endpoint=server.url))
        for line, said in (
            (
                "confidence",
                "reward 'confidence': the target tells no log-prob.* it is big",
            ),
            (
                "chair+grounding",
                "reward 'grounding': big scores no given .*=grounding#words",
            ),
        ):
            with pytest.raises(ValueError, match=said):
                Pipeline(None, silent, build_reward(line))
        Pipeline(None, silent, build_reward({"grounding": {"method": "words"}}))
        telling = ModelConfig("big", endpoint=server.url, client={"logprobs": True})
        Pipeline(None, EndpointModel(telling), build_reward("confidence"))
        assert not server.asked
        with pytest.raises(ValueError, match="big: scores no given texts"):
            TargetScorer(silent)(["a"], ["b"])
    with pytest.raises(ValueError, match="tells no log-probabilities"):
        build_reward("confidence")(["a"], [""], ["b"])
    with pytest.raises(ValueError, match="expected a target that scores texts, got none"):
        build_reward("grounding")(["a"], [""], ["b"])
    for spec in ("confidence#word", "grounding#guess", {"grounding": {"method": "guess"}}):
        with pytest.raises(ValueError, match='expected "'):
            build_reward(spec)


def test_scores_are_of_the_row_alone(model):
    """In chunks, with an empty answer, and one that does not fit."""
    scorer = TargetScorer(model)
    prompts, answers = ["the rain", None, "say it"] * 30, ["tin", "a heron in the rain", ""] * 30
    found = scorer(prompts, answers)
    assert found[:3] * 30 == found and found[2] == 0.0 and found[0] != found[1]
    assert [scorer([p], [a])[0] for p, a in zip(prompts[:3], answers[:3], strict=True)] == found[:3]
    assert list(chunks([3, 3, 9, 1, 1], 6)) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert list(chunks([], 6)) == []
    with pytest.raises(ValueError, match=r"answer 1: .* tokens exceed the context of 256"):
        scorer(["a", "b"], ["c", "d" * 400])


def test_the_longest_row_that_is_said_to_fit_is_scored(model):
    answer = "a heron in the rain"
    params = SamplingParams(max_new_tokens=len(model.tokenizer.encode(answer)))
    reward, prompt = build_reward("chair+2*grounding"), Conversation((("system", "x"),), "tides")
    unread = rewards_unread_by([reward], params)
    assert unread(prompt, {"source": "tin " * 999}) is None  # no model is given to it yet
    offer_scorer(reward, TargetScorer(model))
    unread = rewards_unread_by([reward], params)
    grounding = reward.terms["grounding"][1]
    refused = []
    for count in range(20, 120):
        source = "tin " * count + "."
        reason = unread(prompt, {"source": source})
        refused.append(reason is not None)
        if reason is None:
            score_checked(grounding, [prompt], [""], [answer], {"source": [source]})
            continue
        with pytest.raises(ValueError, match=r"exceed the context of 256"):
            score_checked(grounding, [prompt], [""], [answer], {"source": [source]})
    assert reason.startswith("for reward 'grounding' with column 'source': ")
    assert "exceed the context of" in reason and {True, False} == set(refused)
    words = build_reward("grounding#words")
    offer_scorer(words, TargetScorer(model))
    assert rewards_unread_by([words], params)("a", {"source": "tin " * 999}) is None
