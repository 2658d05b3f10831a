"""The arms: same prompts, same seeds, paired by prompt; numbers against hand-made rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.config import EvalConfig, LoraConfig, Prompting
from alignpro.evaluate.arms import evaluate_arms, kl_per_rewrite
from alignpro.models.native_model import load_model
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import WeightedSum
from alignpro.types import SamplingParams
from fake_model import FakeModel

PROMPTS = ["one", "two", "three", "four"]
PROMPTING = Prompting(template="Advise: {prompt}", separator=" ")


def make(reward, *, seed=3, **changes):
    config = EvalConfig(seed=seed, num_rewrites=3, num_responses=2, prompting=PROMPTING, **changes)
    pipeline = Pipeline(FakeModel("p"), FakeModel("t"), reward, prompting=PROMPTING)
    return pipeline, config


def by_prompt(prompts, rewrites, responses, **columns):
    """Known in advance: the prompt's index, and one more wherever a prompter wrote something."""
    return [PROMPTS.index(p) + float(bool(w)) for p, w in zip(prompts, rewrites, strict=True)]


def test_means_intervals_and_differences():
    pipeline, config = make(by_prompt)
    seen = []
    report = evaluate_arms(
        pipeline,
        PROMPTS,
        config,
        prompters={"untuned": None, "trained": None},
        on_progress=lambda *row: seen.append(row),
    )
    raw = report["arms"]["raw"]
    assert raw["mean_reward"] == 1.5
    assert raw["n"] == 4 and raw["num_responses"] == 24
    assert raw["reward_variance"] == pytest.approx(np.var(np.repeat(range(4), 6), ddof=1))
    assert raw["ci95"][0] < 1.5 < raw["ci95"][1]
    assert raw["components"] == {"by_prompt": 1.5}
    written = report["arms"]["trained"]["mean_reward"] - 1.5
    assert 0 < written <= 1
    assert report["paired"]["trained_minus_raw"]["mean"] == pytest.approx(written)
    # The same adapter under the same seeds: the very same text.
    assert report["arms"]["untuned"] == report["arms"]["trained"]
    assert report["paired"]["trained_minus_untuned"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert report["kl_per_rewrite"] is None  # a prompter that shows no distributions
    assert [row for row in seen if row[1] == row[2]] == [
        ("raw", 24, 24),
        ("untuned", 36, 36),
        ("trained", 36, 36),
    ]


def test_prompters_differ_by_their_adapter_alone():
    pipeline, config = make(by_prompt)
    # The fake takes anything for an adapter; evaluate_arms passes it on.
    report = evaluate_arms(
        pipeline, PROMPTS, config, prompters={"untuned": None, "trained": "other"}
    )
    first, second = (
        [sample[f"rewrite_{arm}"] for sample in report["samples"]] for arm in ("untuned", "trained")
    )
    assert first != second
    assert {h.adapter for h in pipeline.prompter.handles} == {None, "other"}


def test_samples_are_the_first_prompts_not_the_best():
    pipeline, config = make(by_prompt, num_samples=2)
    report = evaluate_arms(pipeline, PROMPTS, config, prompters={"untuned": None, "trained": None})
    assert [sample["prompt"] for sample in report["samples"]] == PROMPTS[:2]
    assert set(report["samples"][0]) == {
        "prompt",
        "response_raw",
        "reward_raw",
        "rewrite_untuned",
        "response_untuned",
        "reward_untuned",
        "rewrite_trained",
        "response_trained",
        "reward_trained",
    }


def test_components_and_columns():
    def asks(prompts, rewrites, responses, level):
        return [float(v) for v in level]

    reward = WeightedSum({"a": (1.0, by_prompt), "b": (0.5, asks)})
    pipeline, config = make(reward)
    report = evaluate_arms(
        pipeline, PROMPTS, config, prompters={"untuned": None}, columns={"level": [2, 2, 4, 4]}
    )
    raw = report["arms"]["raw"]
    assert raw["components"] == {"a": 1.5, "b": 3.0}
    assert raw["mean_reward"] == 3.0
    assert report["paired"] == {}  # nothing was trained


def test_bad_input():
    pipeline, config = make(by_prompt)
    with pytest.raises(ValueError, match="at least 2 for an interval, got 1"):
        evaluate_arms(pipeline, PROMPTS[:1], config, prompters={})
    with pytest.raises(ValueError, match="an evaluation needs a reward"):
        evaluate_arms(pipeline.without_reward(), PROMPTS, config, prompters={})


def test_kl_of_the_engines_rewrites(tiny_model_dir):
    from alignpro.train.policy import LoraPolicy, initial_weights

    model = load_model(tiny_model_dir("llama"), threads=2)
    trained, untuned = (initial_weights(model, LoraConfig(rank=2), seed=s) for s in (0, 1))
    draw = np.random.default_rng(0)
    for weights in (trained, untuned):
        for _, b in weights.matrices.values():
            b[:] = draw.normal(scale=0.1, size=b.shape)
    pipeline = Pipeline(
        model,
        model,
        lambda prompts, rewrites, responses: [0.0] * len(prompts),
        prompting=PROMPTING,
        rewrite_params=SamplingParams(max_new_tokens=7, temperature=1.2),
        response_params=SamplingParams(max_new_tokens=2),
    )
    rollout = pipeline.with_adapter(trained).rollout(PROMPTS * 5, num_rewrites=2, seed=1)
    arguments = {"policy": trained, "temperature": 1.2}
    value = kl_per_rewrite(model, rollout, reference=untuned, **arguments)
    scores = LoraPolicy(model, trained).score(
        [w.prompter_tokens + w.tokens for group in rollout.rewrites for w in group],
        [len(w.prompter_tokens) for group in rollout.rewrites for w in group],
        temperature=1.2,
        reference=untuned,
    )
    assert value == pytest.approx(float(scores.kl.detach().sum()) / 40, rel=1e-5)
    assert value > 0
    assert kl_per_rewrite(model, rollout, reference=trained, **arguments) == 0.0
    against_base = kl_per_rewrite(model, rollout, reference=None, **arguments)
    assert against_base > 0 and not math.isclose(against_base, value)
    report = evaluate_arms(
        pipeline,
        PROMPTS,
        EvalConfig(num_rewrites=2, prompting=PROMPTING),
        prompters={"untuned": untuned, "trained": trained},
    )
    assert report["kl_per_rewrite"] > 0
