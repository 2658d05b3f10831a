"""Training on a device, the device being emulated, beside the CPU engine: gradients of every
family, micro-batches by the device's formula, and a run from its configuration to its end."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import (
    EvalConfig,
    LoraConfig,
    ModelConfig,
    Prompting,
    SftConfig,
    TrainConfig,
    to_mapping,
)
from alignpro.evaluate.run import run_evaluate
from alignpro.models.adapter import LoraWeights, load_peft
from alignpro.models.native_model import load_model, load_models
from alignpro.train.metrics import read_metrics
from alignpro.train.micro_batches import plan_micro_batches
from alignpro.train.policy import LoraPolicy, initial_weights
from alignpro.train.run import make_trainer, run_sft
from alignpro.types import SamplingParams
from model_variants import VARIANTS, variant_folder

LORA = LoraConfig(rank=3, alpha=6.0)
ON_DEVICE = ModelConfig(device="cuda", compute="float32")
# A beginning inside a block of 16 positions under two ends, one that is another's, and a stranger;
# long enough for the window of mistral-window.
SEQUENCES = [
    [1, *range(30, 42), 50, 60, 70, 2],
    [1, *range(30, 42), 50, 9],
    [1, *range(30, 42)],
    [1, 33, 44],
]
STARTS = [12, 13, 11, 1]
# float32 sums in another order, through three layers and back, of each matrix by relative norm.
BUDGET = 5e-5


def weights(model, seed: int) -> LoraWeights:
    made = initial_weights(model, LORA, seed=seed)
    draw = np.random.default_rng(seed)
    for _, b in made.matrices.values():
        b[:] = draw.normal(scale=0.1, size=b.shape)
    return made


def gradients(policy, reference, activations="keep"):
    """Of a loss of all three outputs, and the outputs."""
    scores = policy.score(
        SEQUENCES, STARTS, temperature=1.3, reference=reference, activations=activations
    )
    upstream = torch.randn(3, len(scores.logprob), generator=torch.Generator().manual_seed(3))
    loss = (upstream[0] * scores.logprob + upstream[1] * scores.entropy).sum()
    if scores.kl is not None:
        loss = loss + (upstream[2] * scores.kl).sum()
    policy.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in policy.parameters()], scores


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_every_family_are_the_cpus(name, tiny_model_dir, tmp_path):
    variant = VARIANTS[name]
    folder = variant_folder(variant, tiny_model_dir, tmp_path)
    options = {"context_length": variant.context}
    cpu = load_model(folder, threads=1, **options)
    device = load_model(folder, device="cuda", compute="float32", **options)
    start, reference = weights(cpu, 1), weights(cpu, 4)
    truth, expected = gradients(LoraPolicy(cpu, start), reference)
    got, scores = gradients(LoraPolicy(device, start), reference)
    for mine, theirs in zip(got, truth, strict=True):
        assert float((mine - theirs).norm()) <= BUDGET * float(theirs.norm())
    for value in ("logprob", "entropy", "kl", "reference_logprob"):
        mine, theirs = getattr(scores, value).detach(), getattr(expected, value).detach()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=BUDGET)


def test_recomputing_and_company_change_no_bit(tiny_model_dir):
    device = load_model(tiny_model_dir("qwen3"), device="cuda", compute="float32")
    policy = LoraPolicy(device, weights(device, 1))
    kept, scores = gradients(policy, "base")
    again, _ = gradients(policy, "base", "recompute")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    values = scores.logprob.detach().split(
        [len(s) - start for s, start in zip(SEQUENCES, STARTS, strict=True)]
    )
    for index in (0, 2):
        with torch.no_grad():
            alone = policy.score(SEQUENCES[index : index + 1], [STARTS[index]], temperature=1.3)
        assert torch.equal(alone.logprob, values[index])
    own = policy.score(SEQUENCES[1:3], STARTS[1:3], reference=policy.weights(), with_hidden=True)
    assert float(own.kl.detach().abs().max()) == 0.0
    assert own.hidden is not None and own.hidden.shape == (4, 48)


def test_a_score_takes_what_its_formula_says(tiny_model_dir):
    device = load_model(tiny_model_dir("llama"), device="cuda", compute="float32")
    policy = LoraPolicy(device, weights(device, 1))
    need = {
        mode: policy.score_bytes(SEQUENCES, STARTS, mode, with_reference=True)
        for mode in ("keep", "recompute")
    }
    assert need["recompute"] < need["keep"]
    fewer = policy.score_bytes(SEQUENCES[:1], STARTS[:1], with_reference=True)
    assert fewer < need["keep"]
    assert policy.score_bytes(SEQUENCES[:1], STARTS[:1], with_reference=False) < fewer

    bytes_of = functools.partial(policy.score_bytes, with_reference=True)
    plan = plan_micro_batches(SEQUENCES, STARTS, limit=need["recompute"] - 1, bytes_of=bytes_of)
    assert len(plan) > 1
    for micro in plan:
        part = (micro.of(SEQUENCES), micro.of(STARTS))
        assert bytes_of(*part, micro.activations) < need["recompute"]
    with pytest.raises(ValueError, match="sequence 0: scoring its 17 tokens alone takes"):
        plan_micro_batches(SEQUENCES, STARTS, limit=1 << 14, bytes_of=bytes_of)


def test_bad_input_is_one_line(tiny_model_dir):
    device = load_model(tiny_model_dir("llama"), device="cuda", compute="float32")
    policy = LoraPolicy(device, weights(device, 1))
    for sequences, starts, text in (
        ([[1, 2], []], [1, 1], "score: sequence 1 is empty"),
        ([[1, 2], [1, 2]], [1, 3], r"score: start of sequence 1 must lie in \[1, 2\], got 3"),
        ([[1, 2], [1, 111]], [1, 1], "score: sequence 1 holds token 111"),
        ([[1, 2]], [1, 1], "expected a start for each of 1 sequences, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            policy.score(sequences, starts)
        with pytest.raises(ValueError, match=text):
            policy.score_bytes(sequences, starts, with_reference=True)
    core, adapter = device.core_model, policy.core_adapter()
    with pytest.raises(ValueError, match='activations: expected "keep" or "recompute", got "some"'):
        core.score([[1, 2]], [1], adapter=adapter, keep_graph=True, activations="some")
    score = core.score([[1, 2]], [1], adapter=adapter, keep_graph=True)
    with pytest.raises(ValueError, match="backward: d_logprob has 2 values, expected 1"):
        score.backward(np.ones(2, np.float32), None, None)
    other = load_model(tiny_model_dir("qwen3"), device="cuda", compute="float32")
    with pytest.raises(ValueError, match="does not fit this model"):
        other.core_model.score([[1, 2]], [1], adapter=adapter, keep_graph=True)


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    """Two steps of two prompts and two rewrites, as small as they come."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("he", "in")), "utf-8")

    def make(**changes) -> TrainConfig:
        defaults = {
            "prompter": replace(ON_DEVICE, model=str(tiny_model_dir("llama"))),
            "data": {"path": str(data), "split": None},
            "reward": "letter_reward:count_e",
            "run_dir": str(tmp_path / "run"),
            "steps": 2,
            "prompts_per_step": 2,
            "num_rewrites": 2,
            "rewrite": SamplingParams(max_new_tokens=3),
            "response": SamplingParams(max_new_tokens=2),
            "prompting": Prompting(template="{prompt}", separator=" "),
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "lora": LORA,
            "threads": 1,
        }
        return TrainConfig(**{**defaults, **changes})

    return make


def test_a_run_on_the_device_is_the_cpus(config, tmp_path):
    """Same tokens, and metrics up to float32 sums in another order; parity is exact on both. Then
    it is resumed from the command line, and evaluated."""
    on_device = config()
    trainer = make_trainer(on_device)
    assert trainer.pipeline.prompter is trainer.pipeline.target  # one base, one engine
    assert trainer.pipeline.prompter.config["device"] == "cuda"
    trainer.train()
    on_cpu = config(prompter=on_device.prompter.model, run_dir=str(tmp_path / "cpu"))
    make_trainer(on_cpu).train()
    rows, truth = (read_metrics(f"{c.run_dir}/metrics.jsonl") for c in (on_device, on_cpu))
    assert len(rows) == 2
    for mine, theirs in zip(rows, truth, strict=True):
        assert mine["parity_max_abs"] == 0.0
        for name, value in theirs.items():
            if isinstance(value, float) and name not in ("tokens_per_second", "kl_per_second"):
                assert mine[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
            elif name not in ("seconds", "tokens_per_second"):
                assert mine[name] == value, name
    modules = trainer.policy.model.lora_modules
    ours, cpus = (load_peft(f"{c.run_dir}/adapter", modules).matrices for c in (on_device, on_cpu))
    for name, pair in ours.items():
        for mine, theirs in zip(pair, cpus[name], strict=True):
            assert mine.dtype == np.float32
            # AdamW's first steps divide a gradient by itself: a tiny one may come out elsewhere.
            assert np.linalg.norm(mine - theirs) <= 2e-2 * np.linalg.norm(theirs), name

    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_mapping(config(steps=3))), "utf-8")
    assert CliRunner().invoke(app, ["train", str(file), "--resume"]).exit_code == 0
    assert len(read_metrics(f"{on_device.run_dir}/metrics.jsonl")) == 3
    report = run_evaluate(
        EvalConfig(
            prompter=on_device.prompter,
            trained=f"{on_device.run_dir}/adapter",
            data=on_device.data,
            reward=on_device.reward,
            num_rewrites=1,
            rewrite=on_device.rewrite,
            response=on_device.response,
            prompting=on_device.prompting,
            threads=1,
        )
    )
    assert report.evaluation_config["prompter"]["device"] == "cuda"
    arguments = ["generate", "he", "--run", on_device.run_dir, "--device", "cuda", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2"])
    assert result.exit_code == 0 and "rewrite: " in result.stderr, result.output


def test_a_warm_start_on_the_device_is_the_cpus(tiny_model_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "he", "instruction": "in"}\n', "utf-8")
    made = {}
    for device in ("cuda", "cpu"):
        options = SftConfig(
            prompter=ModelConfig(str(tiny_model_dir("llama")), device=device, compute="float32"),
            data=str(pairs),
            run_dir=str(tmp_path / device),
            steps=1,
            batch_size=1,
            lora=LORA,
            prompting=Prompting(template="{prompt}", separator=" "),
            threads=1,
        )
        run_sft(options)
        (made[device],) = read_metrics(tmp_path / device / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert made["cuda"][name] == pytest.approx(made["cpu"][name], rel=1e-4), name
    elsewhere = replace(options.prompter, device="cuda", compute=None)  # bfloat16
    with pytest.raises(ValueError, match="intermediate_size: expected a multiple of 8 in BF16"):
        run_sft(replace(options, prompter=elsewhere, run_dir=str(tmp_path / "bfloat16")))


def test_which_models_share_a_base(config):
    folder = config().prompter.model
    here, there = ModelConfig(folder), replace(ON_DEVICE, model=folder)
    for first, second, shared in (
        (there, here, False),
        (here, ON_DEVICE, False),
        (there, ON_DEVICE, True),
        (there, None, True),
    ):
        prompter, target = load_models(first, second, 1)
        assert (prompter is target) == shared
        assert prompter.config["compute"] == target.config["compute"] == "float32"
    # The tuned target is trained where it is.
    tuned = make_trainer(config(policy="target", prompter=folder, target=ON_DEVICE, num_rewrites=2))
    assert tuned.policy.model.config["device"] == "cuda"
