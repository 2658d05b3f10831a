"""The rows of a soft prompt as what every stage trains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignpro.config import (
    BoundConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PreferConfig,
    Prompting,
    SelfImproveConfig,
    SftConfig,
    SoftPromptConfig,
    TrainConfig,
    from_mapping,
    to_mapping,
)
from alignpro.config.train import ClosedFormConfig
from alignpro.evaluate.of_run import settings_of_run
from alignpro.evaluate.results import Report
from alignpro.models.adapter import LoraWeights, load_peft, save_peft
from alignpro.models.native_model import load_model
from alignpro.models.soft_prompt import SoftPrompt, SoftRows
from alignpro.prompter import Prompter
from alignpro.report.warnings import find_warnings
from alignpro.train.callbacks import TrainCallback
from alignpro.train.metrics import read_metrics
from alignpro.train.run import make_trainer, run_prefer, run_sft, run_train
from alignpro.train.soft_prompt import SoftPromptPolicy, initial_rows
from alignpro.types import SamplingParams
from native_runs import lora

PROMPTS = [f"how do {name} fly" for name in "abcdefgh"]
SOFT = SoftPromptConfig(num_tokens=4, init="text: in the rain")


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


@pytest.fixture
def base(tmp_path, tiny_model_dir):
    """What all stages of a test have in common."""
    rows = [
        {"prompt": prompt, "instruction": "be kind", "chosen": "the bee", "rejected": "a toad"}
        for prompt in PROMPTS
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "prompter": ModelConfig(str(tiny_model_dir("llama"))),
        "data": str(tmp_path / "p.jsonl"),
        "run_dir": str(tmp_path / "run"),
        "tuner": "soft_prompt",
        "soft_prompt": SOFT,
        "prompting": Prompting(template="say {prompt}", separator="\n"),
        "learning_rate": 2e-2,
        "threads": 1,
    }


def train(base, **changes):
    return from_config(
        TrainConfig,
        {
            **base,
            "steps": 3,
            "prompts_per_step": 3,
            "num_rewrites": 3,
            "reward": "letter_reward:count_e",
            "rewrite": SamplingParams(max_new_tokens=4),
            "response": SamplingParams(max_new_tokens=5),
            "checkpoint_every": 2,
            **changes,
        },
    )


def from_config(cls, values):
    """Through a mapping, as a file is read."""
    return from_mapping(cls, {k: v if isinstance(v, str | int | float) else _plain(v)
                              for k, v in values.items()})  # fmt: skip


def _plain(value):
    return to_mapping(value) if hasattr(value, "__dataclass_fields__") else value


def log(run_dir):
    rows = read_metrics(f"{run_dir}/metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


# --- how rows begin ---


def test_initial_rows(model):
    table = model.base_table("embed_tokens")
    tokens = model.tokenizer.encode("in the rain")
    text = initial_rows(model, replace(SOFT, num_tokens=len(tokens) + 2), seed=0)
    np.testing.assert_array_equal(text, table[[*tokens, *tokens[:2]]])
    np.testing.assert_array_equal(initial_rows(model, SOFT, seed=1), table[tokens[:4]])
    words = SoftPromptConfig(num_tokens=9)
    drawn = initial_rows(model, words, seed=5)
    assert all((row == table).all(axis=1).any() for row in drawn)
    np.testing.assert_array_equal(drawn, initial_rows(model, words, seed=5))
    assert not np.array_equal(drawn, initial_rows(model, words, seed=6))
    many = initial_rows(model, SoftPromptConfig(num_tokens=200, init="random"), seed=0)
    assert many.std() == pytest.approx(table.std(), rel=0.05) and many.dtype == np.float32
    with pytest.raises(ValueError, match=r"fewer rows than .* \(256 tokens\), got 1000000"):
        initial_rows(model, SoftPromptConfig(num_tokens=1_000_000), seed=0)
    for policy in (model, lora(model)):
        with pytest.raises(ValueError, match="expected a SoftPrompt, got"):
            SoftPromptPolicy(model, policy)


def test_gradients_of_rows_agree_with_finite_differences(model):
    policy = SoftPromptPolicy.fresh(model, SOFT, "\n", seed=0)
    reference = policy.weights()
    with torch.no_grad():
        policy.embeddings += 0.01
    ids = [-1, -2, -3, -4]
    sequences, starts = [[1, 40, *ids, 60, 70], [1, 40, *ids, 9], [*ids, 33]], [6, 6, 4]
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(3, 4, generator=generator)

    def loss():
        s = policy.score(sequences, starts, temperature=1.3, reference=reference)
        return (upstream[0] * s.logprob + upstream[1] * s.entropy + upstream[2] * s.kl).sum()

    loss().backward()
    direction = torch.randn(policy.embeddings.shape, generator=generator)
    slope, step = float((policy.embeddings.grad * direction).sum()), 1e-4
    with torch.no_grad():
        policy.embeddings += step * direction
        above = float(loss())
        policy.embeddings -= 2 * step * direction
        below = float(loss())
    # Central differences in float32; rounding / step leaves about 1e-2 of these rows of 0.02.
    assert slope == pytest.approx((above - below) / (2 * step), rel=2e-2)


# --- the stages ---


@pytest.mark.parametrize("policy", ["prompter", "target"])
@pytest.mark.parametrize("place", ["start", "instruction"])
def test_reinforcement_learning(base, model, policy, place):
    soft = replace(SOFT, place=place)
    trainer = run_train(train(base, policy=policy, soft_prompt=soft))
    rows = log(trainer.run_dir)
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 3
    assert rows[0]["kl_per_rewrite"] == 0.0 < rows[-1]["kl_per_rewrite"]
    separator = "\n" if place == "instruction" else ""
    came, began = (
        load_peft(trainer.run_dir / name, model.lora_modules) for name in ("adapter", "reference")
    )
    assert came.placed == began.placed == SoftRows(4, place, separator)
    np.testing.assert_array_equal(began.rows, initial_rows(model, SOFT, seed=0))
    moved = np.abs(came.rows - began.rows)
    assert moved.max() > 0 and came.base_fingerprint == model.fingerprint
    found = settings_of_run(EvalConfig, trainer.run_dir)
    if policy == "target":
        assert found.soft == str(trainer.run_dir / "adapter")
        assert (found.tuned, found.trained, found.target) == (None, None, None)
        assert settings_of_run(BoundConfig, trainer.run_dir).tuned == found.soft
    else:
        assert found.trained == str(trainer.run_dir / "adapter")
        assert found.prompter.adapter == str(trainer.run_dir / "reference")
        with Prompter.from_run(trainer.run_dir, threads=1) as prompter:
            (rewrite,) = prompter.rewrites(["how do x fly"], seed=1)[0]
        assert [t for t in rewrite.prompter_tokens if t < 0] == [-1, -2, -3, -4]


def test_a_run_goes_on_to_the_bit(base):
    whole = run_train(train(base, run_dir=base["run_dir"] + "-whole"))

    class Stop(TrainCallback):
        def on_step(self, row):
            if row["step"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(train(base)).train([Stop()])
    parts = run_train(train(base), resume=True)
    assert log(parts.run_dir) == log(whole.run_dir)
    np.testing.assert_array_equal(parts.policy.weights().rows, whole.policy.weights().rows)
    with pytest.raises(ValueError, match=r"soft_prompt\.place was 'start', is 'instruction'"):
        make_trainer(train(base, soft_prompt=replace(SOFT, place="instruction")), resume=True)


def test_other_algorithms(base):
    ppo = {"epochs": 2, "minibatches": 1, "value_head": True}
    rows = log(run_train(train(base, algorithm="ppo", ppo=ppo)).run_dir)
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 3
    fitted = run_train(train(base, algorithm="closed_form", run_dir=base["run_dir"] + "-fit"))
    began = load_peft(fitted.run_dir / "reference", fitted.policy.model.lora_modules)
    assert not np.array_equal(fitted.policy.weights().rows, began.rows)


def test_warm_start_then_reinforcement_learning(base):
    values = {k: v for k, v in base.items()}
    warm = run_sft(from_config(SftConfig, {**values, "steps": 12, "batch_size": 4}))
    rows = log(base["run_dir"])
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert isinstance(warm, SoftPrompt) and warm.placed == SoftRows(4)
    prompter = {"model": base["prompter"].model, "adapter": base["run_dir"] + "/adapter"}
    again = train(base, prompter=prompter, run_dir=base["run_dir"] + "-rl", steps=1)
    trainer = run_train(again)
    kept = load_peft(trainer.run_dir / "reference", trainer.policy.model.lora_modules)
    np.testing.assert_array_equal(kept.rows, warm.rows)
    other = train(base, prompter=prompter, run_dir=base["run_dir"] + "-x", tuner="lora",
                  soft_prompt=SoftPromptConfig())  # fmt: skip
    with pytest.raises(ValueError, match=r"tuner: expected soft_prompt, .* got lora"):
        make_trainer(other)
    for changes, said in (
        ({"num_tokens": 5}, "num_tokens: expected 4, as of the adapter given, or unset, got 5"),
        ({"place": "instruction"}, "place: expected start, .* got instruction"),
    ):
        asked = {"soft_prompt": replace(SOFT, **changes), "run_dir": base["run_dir"] + "-x"}
        with pytest.raises(ValueError, match=rf"soft_prompt\.{said}"):
            make_trainer(train(base, prompter=prompter, **asked))


@pytest.mark.parametrize("policy", ["prompter", "target"])
def test_preferences(base, policy):
    settings = {**base, "steps": 10, "batch_size": 4, "policy": policy, "beta": 0.5}
    weights = run_prefer(from_config(PreferConfig, settings))
    rows = log(base["run_dir"])
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-12) and rows[0]["margin"] == 0.0
    assert rows[-1]["margin"] > 0.1 and isinstance(weights, SoftPrompt)
    more = run_prefer(from_config(PreferConfig, {**settings, "steps": 11}), resume=True)
    assert len(log(base["run_dir"])) == 11 and not np.array_equal(more.rows, weights.rows)


# --- what is refused, and said ---


def test_what_a_tuner_does_not_read():
    for options, said in (
        ({"soft_prompt": SOFT}, "soft_prompt.num_tokens: expected its default 16"),
        ({"tuner": "soft_prompt", "lora": LoraConfig(rank=2)}, "lora.rank: expected its default"),
        ({"tuner": "soft_prompt", "weight_decay": 0.1}, "weight_decay: expected its default"),
    ):
        for cls in (SftConfig, PreferConfig, TrainConfig):
            with pytest.raises(ValueError, match=said):
                cls(**options, **({"data": "p.jsonl"} if cls is PreferConfig else {}))
    with pytest.raises(ValueError, match="tuner: expected lora: rounds train LoRA matrices"):
        SelfImproveConfig(tuner="soft_prompt")
    for part, said in (({"loss": "pooled"}, "loss: expected another"), ({"mixture": "m"}, "mix")):
        with pytest.raises(ValueError, match=f"closed_form.{said}"):
            TrainConfig(
                tuner="soft_prompt", algorithm="closed_form", closed_form=ClosedFormConfig(**part)
            )
    for init in ("text:", "words", "text:  "):
        with pytest.raises(ValueError, match='init: expected "vocabulary", "random" or "text: '):
            SoftPromptConfig(init=init)


def test_matrices_are_no_rows(base, model, tmp_path):
    save_peft(tmp_path / "lora", lora(model))
    prompter = {"model": base["prompter"].model, "adapter": str(tmp_path / "lora")}
    with pytest.raises(ValueError, match=r"tuner: expected lora, .* got soft_prompt"):
        make_trainer(train(base, prompter=prompter))
    policy = SoftPromptPolicy.fresh(model, SOFT, "\n", seed=0)
    with pytest.raises(ValueError, match=r"adapter: expected .*, got SoftRows"):
        policy.load_weights(SoftPrompt(policy.weights().rows[:3]))
    assert isinstance(lora(model), LoraWeights)


def test_a_rate_for_matrices_is_said(base, caplog):
    make_trainer(train(base, learning_rate=3e-4))
    said = "learning_rate 0.0003 is below 0.001: the rows of a soft prompt hardly move"
    assert said in caplog.text
    caplog.clear()
    make_trainer(train(base), overwrite=True)
    assert "hardly move" not in caplog.text

    for rate, found in ((3e-4, ["slow_rows"]), (1e-2, [])):
        report = Report(config=to_mapping(train(base, learning_rate=rate)))
        assert [f.key for f in find_warnings(report, [])] == found
