"""Bound runs on a tiny model: total variation against sums over every response, and the report."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import BoundConfig, LoraConfig, Prompting
from alignpro.data.load import PromptRow
from alignpro.evaluate.bound import measure_bound
from alignpro.evaluate.results import to_json
from alignpro.models.adapter import save_peft
from alignpro.models.answer_scores import sequence_logprobs
from alignpro.models.mixture import soft_rows
from alignpro.models.native_model import load_model
from alignpro.models.reading import target_tokens
from alignpro.models.soft_prompt import SoftPrompt
from alignpro.pipeline import Pipeline
from alignpro.train.policy import initial_weights
from alignpro.types import SamplingParams

PROMPTING = Prompting(template="Advise: {prompt}", separator=" ")
ROWS = [PromptRow(prompt) for prompt in ("one", "two", "three")]
TEMPERATURE = 0.8
EOS = 2


def letters(prompts, rewrites, responses):
    """In [0, 1], and it depends on the response."""
    return [len(set(r)) / 20 for r in responses]


def constant(prompts, rewrites, responses):
    return [0.5] * len(prompts)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=2)


def lora(model, scale, seed=0):
    weights = initial_weights(model, LoraConfig(rank=2), seed=seed)
    draw = np.random.default_rng(seed)
    for _, b in weights.matrices.values():
        b[:] = draw.normal(scale=scale, size=b.shape)
    return weights


def make(**changes):
    values = {
        "reward_range": (0.0, 1.0),
        "num_rewrites": 3,
        "num_responses": 2,
        "rewrite": SamplingParams(max_new_tokens=4),
        "response": SamplingParams(max_new_tokens=3, temperature=TEMPERATURE),
        "prompting": PROMPTING,
        "kl_coef": 0.1,
        "threads": 2,
    }
    return BoundConfig(**{**values, **changes})


def test_a_target_tuned_to_nothing_is_at_no_distance(model):
    report = to_json(measure_bound(make(), model, model, letters, ROWS, tuned=lora(model, 0.0)))
    assert report["terms"]["tv_tuned"] == {"mean": 0.0, "ci95": [0.0, 0.0]}  # to the bit
    assert report["rewards"]["tuned"] == report["rewards"]["raw"]
    assert report["tuned"] == "adapter" and report["closed_form"] is None


def every_response(model, tokens, **adapter):
    """(responses of at most two tokens, their log-probabilities) after ``tokens``."""
    vocabulary = range(model.config["vocab_size"])
    responses = [[EOS]] + [[a, b] for a, b in itertools.product(vocabulary, vocabulary) if a != EOS]
    score = model.core_model.score(
        [tokens + r for r in responses], [len(tokens)] * len(responses),
        temperature=TEMPERATURE, **adapter,
    )  # fmt: skip
    ends = np.cumsum([len(r) for r in responses])
    logs = [part.sum() for part in np.split(np.asarray(score.logprob, np.float64), ends[:-1])]
    return responses, np.array(logs)


@pytest.mark.parametrize("kind", ["lora", "soft prompt"])
def test_total_variation_of_the_process_that_is_run(model, kind):
    """Responses of at most two tokens: sums over all 12,211 of them."""
    tuned = lora(model, 0.05, seed=1)
    if kind == "soft prompt":
        words = model.base_table("embed_tokens")[model.tokenizer.encode("thin air")]
        tuned = SoftPrompt(words, "instruction", " ")
    config = make(
        num_rewrites=40,
        num_responses=25,
        response=SamplingParams(max_new_tokens=2, temperature=TEMPERATURE),
    )
    rows = ROWS[:2]
    report = to_json(measure_bound(config, model, model, letters, rows, tuned=tuned))
    exact = []
    for row in rows:
        _, base = every_response(model, target_tokens(model.tokenizer, row.prompt))
        read = target_tokens(model.tokenizer, row.prompt, soft_rows(tuned))
        _, other = every_response(model, read, adapter=model.make_adapter(tuned))
        assert np.exp(base).sum() == pytest.approx(1, abs=1e-4)  # the truncated process, whole
        exact.append(0.5 * np.abs(np.exp(base) - np.exp(other)).sum())
    assert 0.1 < np.mean(exact) < 0.9
    # 2,000 draws in [0, 1]: a standard error of at most 0.011.
    assert report["terms"]["tv_tuned"]["mean"] == pytest.approx(np.mean(exact), abs=0.035)
    assert report["truncated_responses"] > 0.5


def test_total_variation_of_rewrites(model):
    config = make(
        num_rewrites=5,
        num_responses=200,
        response=SamplingParams(max_new_tokens=2, temperature=TEMPERATURE),
    )
    rows = ROWS[:2]
    report = to_json(measure_bound(config, model, model, letters, rows))
    pipeline = Pipeline.configured(config, model, model, letters)
    rewrites = pipeline.rewrite([row.prompt for row in rows], num_rewrites=5, seed=config.seed)
    exact = []
    for row, group in zip(rows, rewrites, strict=True):
        tokens = model.tokenizer.encode_chat([{"role": "user", "content": row.prompt}])
        _, base = every_response(model, tokens)
        for rewrite in group:
            _, other = every_response(model, rewrite.target_tokens)
            exact.append(0.5 * np.abs(np.exp(base) - np.exp(other)).sum())
    assert 0.1 < np.mean(exact) < 0.95
    # 2,000 draws in [0, 1] for these very rewrites: a standard error of at most 0.011.
    assert report["terms"]["tv_rewrites"]["mean"] == pytest.approx(np.mean(exact), abs=0.035)


def test_scores_are_those_of_sampling(model):
    pipeline = Pipeline.configured(make(), model, model, None)
    rollout = pipeline.rollout(["one", "two"], num_rewrites=2, num_responses=3, seed=1)
    for group in rollout.rewrites:
        for w in group:
            scored = sequence_logprobs(
                model, [w.target_tokens] * 3, [r.tokens for r in w.responses], TEMPERATURE
            )
            assert scored == [pytest.approx(sum(r.logprobs), abs=1e-12) for r in w.responses]


def test_the_closed_form_and_a_trained_prompter(model):
    config = make(tuned_kl_coef=0.02)
    adapters = {"adapter": lora(model, 0.2), "trained": lora(model, 0.4, 2)}
    report = to_json(measure_bound(config, model, model, letters, ROWS, **adapters))
    assert report["tuned"] == "closed form"
    assert report["closed_form"]["kl_coef"] == 0.02
    assert 1 <= report["closed_form"]["effective_samples"] <= 6
    rewards = {name: value["mean"] for name, value in report["rewards"].items()}
    assert set(rewards) == {"untuned", "raw", "tuned", "optimum", "trained"}
    assert rewards["tuned"] >= rewards["raw"]
    assert report["trained_gap"]["mean"] == pytest.approx(rewards["tuned"] - rewards["trained"])
    assert report["measured_gap"]["mean"] == pytest.approx(rewards["tuned"] - rewards["optimum"])
    terms = {name: value["mean"] for name, value in report["terms"].items()}
    assert report["bound"]["mean"] == pytest.approx(
        terms["tv_tuned"] + terms["tv_rewrites"] - 0.1 * terms["kl"]
    )
    assert report["vacuous"] == (report["bound"]["mean"] >= 1)
    assert json.loads(json.dumps(report)) == report


def test_the_range_of_rewards(model):
    observed = to_json(measure_bound(make(reward_range=None), model, model, letters, ROWS))
    assert observed["reward_range_source"] == "observed"
    low, high = observed["reward_range"]
    assert 0 <= low < high <= 1
    assert measure_bound(make(), model, model, letters, ROWS).reward_range_source == "given"
    with pytest.raises(ValueError, match=r"reward_range: expected every reward from 0.0 to 0.01"):
        measure_bound(make(reward_range=(0.0, 0.01)), model, model, letters, ROWS)
    with pytest.raises(ValueError, match="which shows no range; give reward_range"):
        measure_bound(make(reward_range=None), model, model, constant, ROWS)


def test_one_response_a_rewrite(model):
    report = to_json(measure_bound(make(num_responses=1), model, model, letters, ROWS))
    assert report["terms"]["kl"]["mean"] > 0


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command(model, tmp_path):
    save_peft(tmp_path / "tuned", lora(model, 0.3))
    file = tmp_path / "bound.json"
    settings = [
        f"prompter={model.name}", "reward=letter_reward:count_e", "reward_range=[-20,20]",
        "num_prompts=3", "num_rewrites=2", "num_responses=2", f"tuned={tmp_path / 'tuned'}",
        "rewrite.max_new_tokens=4", "response.max_new_tokens=4", "threads=2",
    ]  # fmt: skip
    result = invoke("bound", *settings, "--output", file)
    assert "Bound on the gap to a tuned target" in result.stdout
    report = json.loads(file.read_text())
    assert report["reward_range"] == [-20.0, 20.0] and report["tuned"] == "adapter"
    assert report["config"]["kl_coef"] == 0.05


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("response.top_p=0.9", "response.top_p: expected 1.0: the untruncated distribution"),
        ("response.temperature=0", "response.temperature: expected above 0"),
        ("reward_range=[1,0]", "reward_range: expected [low, high] with low < high"),
        ("reward_range=[1]", "reward_range: expected [low, high] with low < high"),
        ("kl_coef=0", "kl_coef: expected above 0"),
        ("num_prompts=1", "num_prompts: expected at least 2"),
        ("tuned=none", "tuned: none: no adapter_config.json there; expected the folder"),
    ],
)
def test_bad_input_is_one_line(setting, line):
    error = invoke("bound", "prompter=nowhere", setting, code=2).stderr
    assert error.count("\n") == 1 and line in error


def test_a_coefficient_for_a_target_that_is_tuned():
    with pytest.raises(ValueError, match=r"tuned_kl_coef: expected its default None"):
        dataclasses.replace(make(), tuned="folder", tuned_kl_coef=0.1)
