"""Training on the engine itself: gradients through the seam, bits kept, exact resume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from alignpro.config import LoraConfig, PpoConfig, Prompting, SftConfig, TrainConfig
from alignpro.data.load import PromptRow
from alignpro.models.native_model import load_model
from alignpro.train.callbacks import TrainCallback
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy, initial_weights
from alignpro.train.run import trainer_from
from alignpro.train.sft import warm_start
from alignpro.types import SamplingParams

PROMPTS = ["the heron", "a tin roof", "on the other hand", "in the rain", "the red one"]
ROWS = [PromptRow(prompt) for prompt in PROMPTS]
LORA = LoraConfig(rank=3, alpha=6.0)
SEQUENCES, STARTS = [[1, 40, 50, 60, 70, 2], [1, 40, 50, 9], [1, 33, 44]], [3, 3, 1]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=2)


@pytest.fixture
def policy(model):
    weights = initial_weights(model, LORA, seed=1)
    draw = np.random.default_rng(2)
    for _, b in weights.matrices.values():
        b[:] = draw.normal(scale=0.1, size=b.shape)
    return LoraPolicy(model, weights)


def letters(prompts, rewrites, responses, **columns):
    """More for rewrites with many "e"s: something that sampling can find."""
    return [r.count("e") - 0.1 * len(w) for w, r in zip(rewrites, responses, strict=True)]


def config(tmp_path, **changes):
    defaults = {
        "run_dir": str(tmp_path / "run"),
        "steps": 6,
        "prompts_per_step": 3,
        "num_rewrites": 3,
        "rewrite": SamplingParams(max_new_tokens=6),
        "response": SamplingParams(max_new_tokens=5),
        "prompting": Prompting(template="say {prompt}", separator=" "),
        "learning_rate": 1e-2,
        "lora": LORA,
        "checkpoint_every": 100,
        "micro_batch_size": 4,
    }
    return TrainConfig(**{**defaults, **changes})


def trainer(settings, model, *, reward=letters, **options):
    start = initial_weights(model, LORA, seed=8)
    draw = np.random.default_rng(9)
    for _, b in start.matrices.values():
        b[:] = draw.normal(scale=0.05, size=b.shape)
    return trainer_from(settings, model, model, reward, ROWS, start, **options)


def log(trainer):
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


def test_gradients_of_every_output_agree_with_finite_differences(policy):
    reference = initial_weights(policy.model, LORA, seed=4)
    for _, b in reference.matrices.values():
        b[:] = 0.05
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(3, 6, generator=generator)

    def loss():
        s = policy.score(SEQUENCES, STARTS, temperature=1.3, reference=reference)
        return (upstream[0] * s.logprob + upstream[1] * s.entropy + upstream[2] * s.kl).sum()

    loss().backward()
    directions = [torch.randn(p.shape, generator=generator) for p in policy.parameters()]
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(policy.parameters(), directions, strict=True)
    )
    step = 1e-3

    def moved(by):
        with torch.no_grad():
            for p, d in zip(policy.parameters(), directions, strict=True):
                p.add_(by * d)
            value = float(loss())
            for p, d in zip(policy.parameters(), directions, strict=True):
                p.sub_(by * d)
        return value

    # Central differences in float32 along one direction; rounding / step leaves about 1e-3.
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-2)


def test_scores_with_and_without_a_graph_have_the_same_bits(policy):
    with_graph = policy.score(SEQUENCES, STARTS, reference="base")
    with torch.no_grad():
        without = policy.score(SEQUENCES, STARTS, reference="base")
    for name in ("logprob", "entropy", "kl", "reference_logprob"):
        assert torch.equal(getattr(with_graph, name).detach(), getattr(without, name))
    assert not without.logprob.requires_grad


def test_kl_to_its_own_weights_is_zero_to_the_bit(policy):
    scores = policy.score(SEQUENCES, STARTS, reference=policy.weights())
    assert float(scores.kl.detach().abs().max()) == 0.0
    fresh = LoraPolicy.fresh(policy.model, LORA, seed=0)
    assert float(fresh.score(SEQUENCES, STARTS, reference="base").kl.detach().abs().max()) == 0.0


def test_only_chosen_modules_are_trained(model):
    chosen = LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))
    policy = LoraPolicy.fresh(model, chosen, seed=0)
    assert {name.rsplit(".", 1)[-1] for name in policy.names} == {"q_proj", "down_proj"}
    policy.score(SEQUENCES, STARTS).logprob.sum().backward()
    assert all(b.grad.abs().max() > 0 for b in policy.lora_b)  # A's is 0 while B is 0
    assert all(a.grad.abs().max() == 0 for a in policy.lora_a)


def test_sft_lowers_the_loss(model):
    policy = LoraPolicy.fresh(model, LORA, seed=0)
    pairs = [(prompt, "in the rain") for prompt in PROMPTS]
    settings = SftConfig(steps=12, batch_size=5, learning_rate=1e-2)
    rows = list(warm_start(policy, pairs, settings).rows())
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_sampled_and_scored_log_probabilities_are_equal_while_training(model, tmp_path):
    run = trainer(config(tmp_path, steps=4), model)
    run.train()
    rows = log(run)
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 4
    assert [row["ratio_max"] for row in rows] == [1.0] * 4
    assert rows[0]["kl_per_rewrite"] == 0.0 and rows[-1]["kl_per_rewrite"] > 0.0


@pytest.mark.parametrize("value_head", [False, True])
def test_ppo_on_the_engine(model, tmp_path, value_head):
    ppo = PpoConfig(epochs=2, minibatches=2, value_head=value_head)
    run = trainer(config(tmp_path, steps=3, algorithm="ppo", ppo=ppo), model)
    run.train()
    rows = log(run)
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 3
    assert all(row["updates"] == 4 and row["ratio_max"] > 1.0 for row in rows)
    assert value_head == ("value_loss" in rows[0])


def test_a_target_tuned_on_the_engine(model, tmp_path):
    settings = config(tmp_path, steps=3, policy="target", response=SamplingParams(max_new_tokens=5))
    run = trainer(settings, model, reward=lambda p, w, r, **_: [float(len(x)) for x in r])
    run.train()
    rows = log(run)
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 3
    assert rows[0]["kl_per_rewrite"] == 0.0 < rows[-1]["kl_per_rewrite"]


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_parity_holds_at_other_temperatures(model, tmp_path, temperature):
    rewrite = SamplingParams(max_new_tokens=6, temperature=temperature)
    run = trainer(config(tmp_path, steps=2, rewrite=rewrite), model)
    run.train()
    assert [row["parity_max_abs"] for row in log(run)] == [0.0] * 2


def test_six_steps_are_three_then_three_on_other_threads(model, tiny_model_dir, tmp_path):
    whole = trainer(config(tmp_path / "whole"), model)
    whole.train()
    settings = config(tmp_path / "split")
    first = trainer(settings, model)

    class Stop(TrainCallback):
        def on_step(self, row):
            if row["step"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train([Stop()])
    other = load_model(tiny_model_dir("llama"), threads=1)
    second = trainer(dataclasses.replace(settings, threads=1), other, resume=True)
    second.train()
    assert log(second) == log(whole)
    mine, theirs = second.policy.weights().matrices, whole.policy.weights().matrices
    assert all(np.array_equal(mine[n][half], theirs[n][half]) for n in mine for half in (0, 1))


@pytest.mark.parametrize("activations", ["auto", "keep", "recompute"])
def test_the_memory_limit_does_not_change_the_gradient(model, tmp_path, activations):
    rows, gradients = {}, {}
    for name, limit in {"whole": 2**30, "parts": 1_900_000}.items():
        settings = config(
            tmp_path / name, steps=1, memory_limit=limit, activations=activations,
            micro_batch_size=None,
        )  # fmt: skip
        run = trainer(settings, model)
        run.train()
        (rows[name],) = log(run)
        gradients[name] = [p.grad for p in run.policy.parameters()]
    assert rows["whole"]["micro_batches"] == 1 < rows["parts"]["micro_batches"] <= 9
    assert rows["whole"]["parity_max_abs"] == rows["parts"]["parity_max_abs"] == 0.0
    for name in ("loss", "grad_norm", "entropy"):
        assert rows["parts"][name] == pytest.approx(rows["whole"][name], rel=1e-4, abs=1e-6)
    for mine, theirs in zip(gradients["parts"], gradients["whole"], strict=True):
        assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-8


def test_the_bytes_of_a_score_grow_with_its_sequences(policy):
    def need(count, activations="keep"):
        return policy.score_bytes(
            SEQUENCES[:count], STARTS[:count], activations, with_reference=True
        )

    assert need(1) < need(2) < need(3)
    assert need(3, "recompute") < need(3)
    apart = policy.score_bytes(SEQUENCES[:1], STARTS[:1], with_reference=False)
    assert need(2) - need(1) < apart < need(1)  # a shared prefix counts once


def test_training_finds_more_reward(model, tmp_path):
    settings = config(
        tmp_path, steps=25, prompts_per_step=5, num_rewrites=8, kl_coef=0.0, learning_rate=5e-3
    )

    def short(prompts, rewrites, responses, **columns):
        return [-float(len(w)) for w in rewrites]

    run = trainer(settings, model, reward=short)
    run.train()
    rewards = [row["reward_mean"] for row in log(run)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 1.0
