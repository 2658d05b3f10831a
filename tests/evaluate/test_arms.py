"""The arms: same prompts, same seeds, paired by prompt; numbers against hand-made rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignpro.config import EvalConfig, LoraConfig, OptimumConfig, Prompting
from alignpro.evaluate.arms import sample_arms
from alignpro.evaluate.compare import compare_arms, gap_closed
from alignpro.evaluate.optimum import resample_optimum, selection_reliability
from alignpro.evaluate.results import to_json
from alignpro.evaluate.static import StaticInstruction
from alignpro.models.answer_scores import divergences
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


def evaluate(pipeline, prompts, config, *, prompters, **options):
    arms = sample_arms(pipeline, prompts, config, prompters=prompters, **options)
    answers = options.get("columns", {}).get("answer", [None] * len(prompts))
    by_prompt = dict(zip(prompts, answers, strict=True))
    return to_json(compare_arms(pipeline, arms, config, prompters, by_prompt))


def by_prompt(prompts, rewrites, responses, **columns):
    """Known in advance: the prompt's index, and one more wherever a prompter wrote something."""
    return [PROMPTS.index(p) + float(bool(w)) for p, w in zip(prompts, rewrites, strict=True)]


def test_means_intervals_and_differences():
    pipeline, config = make(by_prompt)
    seen = []
    report = evaluate(
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
    # The fake takes anything for an adapter; sample_arms passes it on.
    report = evaluate(pipeline, PROMPTS, config, prompters={"untuned": None, "trained": "other"})
    first, second = (
        [sample[f"rewrite_{arm}"] for sample in report["samples"]] for arm in ("untuned", "trained")
    )
    assert first != second
    assert {h.adapter for h in pipeline.prompter.handles} == {None, "other"}


def test_samples_are_the_first_prompts_not_the_best():
    pipeline, config = make(by_prompt, num_samples=2)
    report = evaluate(pipeline, PROMPTS, config, prompters={"untuned": None, "trained": None})
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
    report = evaluate(
        pipeline, PROMPTS, config, prompters={"untuned": None}, columns={"level": [2, 2, 4, 4]}
    )
    raw = report["arms"]["raw"]
    assert raw["components"] == {"a": 1.5, "b": 3.0}
    assert raw["mean_reward"] == 3.0
    assert report["paired"] == {}  # nothing was trained


def test_bad_input():
    pipeline, config = make(by_prompt)
    with pytest.raises(ValueError, match="at least 2 for an interval, got 1"):
        evaluate(pipeline, PROMPTS[:1], config, prompters={})
    with pytest.raises(ValueError, match="an evaluation needs a reward"):
        evaluate(pipeline.without_reward(), PROMPTS, config, prompters={})
    pipeline, config = make(by_prompt, optimum=OptimumConfig())
    with pytest.raises(ValueError, match="resamples the untuned prompter"):
        evaluate(pipeline, PROMPTS, config, prompters={"trained": None})


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
    rewrites = [w for group in rollout.rewrites for w in group]
    read, written = [w.prompter_tokens for w in rewrites], [w.tokens for w in rewrites]

    def against(reference):
        return divergences(model, read, written, 1.2, policy=trained, reference=reference)

    policy = LoraPolicy(model, trained)
    rows = [p + w for p, w in zip(read, written, strict=True)]
    scores = policy.score(rows, list(map(len, read)), temperature=1.2, reference=untuned)
    kl = math.fsum(one.kl for one in against(untuned))
    assert kl == pytest.approx(float(scores.kl.detach().sum()), rel=1e-5) and kl > 0
    entropy = [one.entropy * len(w) for one, w in zip(against(untuned), written, strict=True)]
    assert math.fsum(entropy) == pytest.approx(float(scores.entropy.detach().sum()), rel=1e-5)
    assert {one.kl for one in against(trained)} == {0.0}
    against_base = math.fsum(one.kl for one in against(None))
    assert against_base > 0 and not math.isclose(against_base, kl)
    report = evaluate(
        pipeline,
        PROMPTS,
        EvalConfig(num_rewrites=2, prompting=PROMPTING),
        prompters={"untuned": untuned, "trained": trained},
    )
    assert report["kl_per_rewrite"] > report["kl_per_token"] > 0
    lengths = report["arms"]["trained"]["rewrite_tokens"]
    assert report["kl_per_token"] * lengths == pytest.approx(report["kl_per_rewrite"])


def handles_reading(model, text):
    wanted = [0, *model.tokenizer.encode(text), 1]
    return [handle for handle in model.handles if handle.prompt_tokens == wanted]


@pytest.mark.parametrize("mode", ["append", "rewrite"])
def test_a_static_instruction_stands_behind_every_prompt(mode):
    prompting = Prompting(mode=mode, template="Advise: {prompt}", separator=" | ")
    config = EvalConfig(num_rewrites=3, num_responses=2, prompting=prompting)
    pipeline = Pipeline(FakeModel("p"), FakeModel("t"), by_prompt, prompting=prompting)
    static = StaticInstruction("Be kind.")
    report = evaluate(pipeline, PROMPTS, config, prompters={"trained": None}, static=static)
    for prompt in PROMPTS:
        assert len(handles_reading(pipeline.target, f"{prompt} | Be kind.")) == 6
    arm = report["arms"]["static"]
    assert arm["instruction"] == "Be kind." and arm["mean_reward"] == 2.5
    assert arm["rewrite_tokens"] == len("Be kind.") and arm["copy_rate"] == 0.0
    assert report["samples"][0]["rewrite_static"] == "Be kind."
    assert list(report["paired"]) == ["trained_minus_raw", "trained_minus_static"]


def test_a_tuned_target_reads_the_raw_prompt():
    pipeline, config = make(by_prompt)
    report = evaluate(
        pipeline, PROMPTS, config, prompters={"untuned": None, "trained": "x"}, tuned="tuned"
    )
    tuned = [handle for handle in pipeline.target.handles if handle.adapter == "tuned"]
    assert {bytes(t - 3 for t in h.prompt_tokens[1:-1]).decode() for h in tuned} == set(PROMPTS)
    assert len(tuned) == 24
    assert "rewrite_tuned" not in report["samples"][0]
    assert report["arms"]["tuned"]["n"] == 4 and "copy_rate" not in report["arms"]["tuned"]
    assert set(report["gap_closed"]) >= {"share", "ci95", "gap"}


def turns(pipeline, begin, end):
    return [bytes(t - 3 for t in h.prompt_tokens[1:-1]).decode() for h in pipeline.target.handles][
        begin:end
    ]


def test_a_policy_and_the_instruction_of_each_label():
    pipeline, config = make(by_prompt, policy_text=" If asked, answer. ")
    static, labelled = StaticInstruction("Go on."), ["A.", "", "C.", ""]
    report = evaluate(
        pipeline, PROMPTS, config, prompters={"trained": None}, static=static, labelled=labelled
    )
    assert list(report["arms"]) == ["raw", "static", "policy_text", "trained", "labelled"]
    assert set(turns(pipeline, 24, 48)) == {f"{p} Go on." for p in PROMPTS}
    assert set(turns(pipeline, 48, 72)) == {f"{p} If asked, answer." for p in PROMPTS}
    # An empty instruction leaves the prompt alone, under the raw prompt's own draws.
    assert set(turns(pipeline, 96, 120)) == {"one A.", "two", "three C.", "four"}
    arms = report["arms"]
    assert arms["policy_text"]["instruction"] == "If asked, answer."
    assert arms["labelled"]["mean_reward"] == 2.0 and arms["labelled"]["empty_rewrites"] == 6
    assert arms["policy_text"]["mean_reward"] == 2.5
    assert set(report["paired"]) == {
        f"trained_minus_{name}" for name in ("raw", "static", "policy_text", "labelled")
    }
    # In rewrite mode instructions are appended all the same.
    rewriting = Prompting(mode="rewrite", template="Advise: {prompt}", separator=" ")
    pipeline = Pipeline(FakeModel("p"), FakeModel("t"), by_prompt, prompting=rewriting)
    arms = sample_arms(pipeline, PROMPTS, config, prompters={}, labelled=labelled)
    assert "one A." in turns(pipeline, 0, None)


def by_length(prompts, rewrites, responses, **columns):
    return [PROMPTS.index(p) + float(len(w)) for p, w in zip(prompts, rewrites, strict=True)]


def test_the_way_from_static_to_labelled():
    pipeline, config = make(by_length)
    report = evaluate(
        pipeline,
        PROMPTS * 10,
        config,
        prompters={"trained": None},
        static=StaticInstruction("1"),
        labelled=["1234"] * 40,
    )
    way, trained = report["static_to_labelled"], report["arms"]["trained"]["mean_reward"]
    assert way["gap"] == {"mean": 3.0, "ci95": [3.0, 3.0]}
    assert way["share"] == pytest.approx((trained - 2.5) / 3)
    assert way["ci95"][0] < way["share"] < way["ci95"][1]
    level = evaluate(
        pipeline,
        PROMPTS,
        config,
        prompters={"trained": None},
        static=StaticInstruction("1"),
        labelled=["2"] * 4,
    )["static_to_labelled"]
    assert level["share"] is None
    assert "the labelled rule is not clearly apart from the static" in level["reason"]


def test_what_is_required_of_the_arms():
    required = ("static>raw+0.9", "static > raw + 1", "raw>static", "trained>raw-2")
    pipeline, config = make(by_prompt, require=required)
    report = evaluate(
        pipeline, PROMPTS, config, prompters={"trained": None}, static=StaticInstruction("x")
    )
    found = report["required"]
    # The difference is exactly 1 for every prompt: above 0.9, and not above itself.
    assert [one["met"] for one in found] == [True, False, False, True]
    assert found[0] == {
        "requirement": "static>raw+0.9",
        "left": "static",
        "right": "raw",
        "difference": {"mean": 1.0, "ci95": [1.0, 1.0]},
        "margin": 0.9,
        "met": True,
    }
    assert found[2]["difference"]["mean"] == -1.0 and found[3]["margin"] == -2.0
    with pytest.raises(ValueError, match=r"require: static>raw\+0.9: expected one of the arms raw"):
        evaluate(pipeline, PROMPTS, config, prompters={})


def test_what_the_arms_wrote_in_numbers():
    reward = WeightedSum({"good": (1.0, by_prompt), "long": (-0.5, by_length)})
    pipeline, config = make(reward)
    report = evaluate(
        pipeline,
        PROMPTS,
        config,
        prompters={"trained": None},
        static=StaticInstruction("Say: x"),
        columns={"answer": ["x", "y", None, ["z", "X"]]},
    )
    static, raw = report["arms"]["static"], report["arms"]["raw"]
    assert static["common_rewrite"] == 1.0 and static["distinct_rewrites"] == 1
    assert static["leaked_answers"] == 0.5 and "leaked_answers" not in raw
    # Values 1, 2, 3, 4 by prompt; what the reward takes off for is no component that should rise.
    assert static["component_errors"] == {"good": pytest.approx(math.sqrt(5 / 3 / 4))}
    assert 0 <= raw["truncated_responses"] <= 1


def test_how_far_the_selection_is_luck():
    # Prompt 1: means 1 and 5, within 2, so Var(R) = 8 - 2/2 = 7; prompt 2 varies nowhere.
    # Averages: Var(R) 3.5, within 1; with two responses a mean adds 1/2.
    rewards = [[[0, 2], [4, 6]], [[1, 1], [1, 1]]]
    assert selection_reliability(rewards) == pytest.approx(3.5 / 4)
    assert selection_reliability([[[1.0], [2.0]]]) is None
    assert selection_reliability([[[0.0, 10.0], [10.0, 0.0]]]) == 0.0
    assert selection_reliability(np.zeros((2, 3, 2))) == 0.0


def longest(prompts, rewrites, responses, **columns):
    return [float(len(w)) for w in rewrites]


def test_the_optimum_is_the_best_candidate_where_kl_coef_is_small():
    optimum = OptimumConfig(num_candidates=30, num_responses=1)
    pipeline, config = make(longest, kl_coef=0.01, optimum=optimum)
    report = evaluate(pipeline, PROMPTS, config, prompters={"untuned": None})
    arm = report["arms"]["optimum"]
    # Of 30 candidates out of eight texts the longest, "with care", is one.
    assert arm["mean_reward"] == len("with care")
    assert report["arms"]["untuned"]["mean_reward"] < 9
    assert 1 <= arm["effective_samples"] < 30
    assert arm["num_responses"] == 24 and arm["kl_coef"] == 0.01
    assert "selection_reliability" not in arm  # of one response a candidate


def test_the_optimum_is_the_untuned_prompter_where_kl_coef_is_large():
    optimum = OptimumConfig(num_candidates=30, num_responses=1)
    pipeline, config = make(longest, kl_coef=1e6, optimum=optimum)
    report = evaluate(pipeline, PROMPTS * 30, config, prompters={"untuned": None})
    arms = report["arms"]
    assert arms["optimum"]["effective_samples"] == pytest.approx(30)
    # 360 rewrites with a deviation of 2.7 between texts: a standard error of 0.2 in the difference.
    assert arms["optimum"]["mean_reward"] == pytest.approx(arms["untuned"]["mean_reward"], abs=0.6)


def test_what_chose_a_rewrite_does_not_judge_it():
    """A reward of pure luck: the best of many responses wins, and its fresh answers are average."""

    def luck(prompts, rewrites, responses, **columns):
        draws = np.random.default_rng(len(prompts))
        return list(draws.normal(size=len(prompts)))

    optimum = OptimumConfig(num_candidates=20, num_responses=1)
    pipeline, config = make(luck, kl_coef=0.01, optimum=optimum)
    chosen = resample_optimum(pipeline, PROMPTS * 20, config, optimum)
    assert all(
        math.isnan(r.reward) for g in chosen.rollout.rewrites for w in g for r in w.responses
    )
    report = evaluate(pipeline, PROMPTS * 20, config, prompters={"untuned": None})
    assert abs(report["arms"]["optimum"]["mean_reward"]) < 0.2  # the chosen ones' mean is 1.9
    seeds = [
        {h.params.seed for h in pipeline.target.handles[a:b]} for a, b in ((0, 1600), (1600, 2080))
    ]
    assert not seeds[0] & seeds[1]


def test_the_share_of_the_gap_by_hand():
    untuned, tuned = [0.0, 1.0, 2.0, 3.0] * 5, [2.0, 3.0, 4.0, 5.0] * 5
    trained = [value + 0.5 for value in untuned]
    result = to_json(gap_closed(untuned, trained, tuned, seed=0))
    assert result["share"] == pytest.approx(0.25) and result["ci95"] == pytest.approx([0.25, 0.25])
    assert result["gap"] == {"mean": 2.0, "ci95": [2.0, 2.0]}


def test_no_share_of_a_gap_that_may_be_none():
    draws = np.random.default_rng(0)
    untuned, trained, tuned = draws.normal(size=(3, 40)).tolist()
    result = to_json(gap_closed(untuned, trained, tuned, seed=0))
    assert result["share"] is None and result["ci95"] is None
    assert "not clearly apart" in result["reason"]
    low, high = result["gap"]["ci95"]
    assert low < 0 < high


def test_a_tuned_target_that_is_worse_still_has_a_share():
    result = to_json(gap_closed([1.0] * 5, [0.5] * 5, [0.0] * 5, seed=0))
    assert result["share"] == pytest.approx(0.5)
