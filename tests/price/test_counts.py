"""Counts of a dry run against a hand's, the engine's own formulas, and one real step's trace."""

from __future__ import annotations

import json

import numpy as np
import pytest

from alignpro.bench.step import forced_lengths
from alignpro.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PpoConfig,
    Prompting,
    TrainConfig,
)
from alignpro.models.native_model import load_model
from alignpro.native import ModelFileError, core
from alignpro.pipeline import Pipeline
from alignpro.price.lengths import Lengths, find_lengths, local_prompts
from alignpro.price.models import find_priced
from alignpro.price.work import count_step, lora_parameters
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy
from alignpro.train.trainer import Trainer
from alignpro.types import SamplingParams
from conftest import FAMILIES

SMALL = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 100,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def small(tmp_path):
    """A model by its config.json alone, with some keys changed."""

    def make(**changes):
        (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
        return find_priced(str(tmp_path)).held("cuda", "bfloat16")

    return make


def config(**changes):
    defaults = {
        "prompts_per_step": 2,
        "num_rewrites": 3,
        "num_responses": 2,
        "rewrite": SamplingParams(max_new_tokens=5),
        "response": SamplingParams(max_new_tokens=4),
        "lora": LoraConfig(rank=1),
        "threads": 2,
    }
    return TrainConfig(**{**defaults, **changes})


def test_a_model_counted_by_hand(small):
    # q 4x4, k and v 2x4, o 4x4, gate and up 6x4, down 4x6
    layer = 16 + 8 + 8 + 16 + 24 + 24 + 24
    plain = small()
    assert plain.facts.layer_parameters == 2 * layer
    assert plain.parameters == 2 * layer + 2 * 40
    assert plain.matrix_bytes == {"layers": 2 * 2 * layer, "head": 80, "embedding": 80}
    assert plain.streamed_bytes == plain.weight_bytes - 80
    assert plain.facts.kv_elements == 2 * 2 * 2
    assert not plain.facts.has_weights
    assert lora_parameters(plain, config()) == 2 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    only = config(lora=LoraConfig(rank=3, target_modules=("q_proj", "down_proj")))
    assert lora_parameters(plain, only) == 2 * 3 * (8 + 10)
    tied = small(tie_word_embeddings=True)
    assert tied.parameters == 2 * layer + 40
    assert tied.matrix_bytes["embedding"] == 0
    fused = small(model_type="phi3")
    assert fused.facts.layer_parameters == plain.facts.layer_parameters
    assert lora_parameters(fused, config()) == 2 * (12 + 8 + 16 + 10)


def test_a_step_counted_by_hand(small):
    model = small()
    lengths = Lengths(10, 7, 12, target_head=6, target_shared=2, target_raw=8, source="")
    work = count_step(config(), lengths, model, model)
    assert work.tokens == {
        "prompter reads": 7 + 2 * 3 + 4,  # shared, own, and the last again for four more samples
        "prompter writes": 6 * 5,
        "target reads": 2 + 2 * 4 + 6 * 6 + 6,
        "target writes": 12 * 4,
        "generated": 30 + 48,
        "scored forward": 2 * (7 + 2 * (3 + 3 * 5)),
        "scored backward": 7 + 2 * (3 + 3 * 5),
    }
    linear, head, lora = model.facts.layer_parameters, 40, work.lora_parameters
    phases = {phase.name: phase for phase in work.phases}
    # A written token sees its prompt and those before it: 11 + 12 + 13 + 14 pairs each.
    pairs = 6 * (11 + 12 + 13 + 14)
    writes = 24 * 2 * (linear + head + lora) + 4 * pairs * 4 * 2
    assert phases["prompter writes"].flops == writes
    assert (
        phases["target writes"].flops == 36 * 2 * (linear + head) + 4 * 12 * (13 + 14 + 15) * 4 * 2
    )
    assert phases["score vocabulary"].flops == 4 * 2 * 30 * head
    # The reference has no LoRA; the backward has it twice, and every frozen matrix once.
    rows, score_pairs = 43, 7 * 8 / 2 + 2 * (8 + 9 + 10) + 6 * (11 + 12 + 13 + 14 + 15)
    attention = 4 * score_pairs * 4 * 2
    forward = rows * 2 * (2 * linear + lora) + 2 * attention
    assert phases["score forward"].flops == forward
    assert phases["score backward"].flops == rows * 2 * (linear + 2 * lora) + 2.5 * attention
    # Keys and values of every position, of both models.
    assert work.kv_elements == 8 * (17 + 24 + 52 + 36)
    assert work.alone_kv_elements == 8 * (10 + 5 + 12 + 4)
    # A step reads the three rewrites' common prompt once, and what each has written so far.
    assert phases["prompter writes"].kv_elements == 8 * 2 * (4 * 10 + 3 * (1 + 2 + 3 + 4))
    assert phases["prompter writes"].weight_bytes == 4 * model.streamed_bytes


def test_other_ways_to_train_counted_by_hand(small):
    model = small()
    lengths = Lengths(10, 7, 12, target_head=6, target_shared=2, target_raw=8, source="")
    plain = count_step(config(), lengths, model, model)

    # Two passes over the batch score twice what one does, and sample the same.
    ppo = count_step(config(algorithm="ppo", ppo=PpoConfig(epochs=2)), lengths, model, model)
    assert ppo.tokens["generated"] == plain.tokens["generated"]
    assert ppo.tokens["scored backward"] == 2 * plain.tokens["scored backward"]
    assert ppo.phases[:4] == plain.phases[:4]
    assert [p.flops for p in ppo.phases[4:]] == [2 * p.flops for p in plain.phases[4:]]

    # The target alone: 2 prompts of 8 tokens, 3 responses of 4 to each, scored with its prompts.
    tuned = count_step(config(policy="target", num_responses=1), lengths, model, model)
    assert tuned.tokens == {
        "target reads": 2 + 2 * 6 + 4,
        "target writes": 6 * 4,
        "generated": 24,
        "scored forward": 2 * (2 + 2 * (6 + 3 * 4)),
        "scored backward": 2 + 2 * (6 + 3 * 4),
    }
    assert tuned.lora_parameters == plain.lora_parameters

    # The dearest of what auto may choose: every response has a rewrite of its own.
    auto = config(num_responses="auto", response_budget=4, num_rewrites=4)
    fixed = config(num_responses=1, num_rewrites=4)
    assert count_step(auto, lengths, model, model) == count_step(fixed, lengths, model, model)

    with pytest.raises(ValueError, match="closed_form is not priced"):
        count_step(config(algorithm="closed_form"), lengths, model, model)


def test_a_smaller_memory_limit_repeats_the_prompts(small):
    model = small()
    lengths = Lengths(40, 30, 42, 36, 2, 38, "")
    whole = count_step(config(), lengths, model, model)
    single = count_step(config(micro_batch_size=1), lengths, model, model)
    again = count_step(config(activations="recompute"), lengths, model, model)
    assert (whole.micro_batches, single.micro_batches) == (1, 6)
    assert single.tokens["scored backward"] == 6 * 45
    assert single.tokens["scored backward"] > whole.tokens["scored backward"]
    passes = {p.name: p.flops for p in whole.phases}
    extra = {p.name: p.flops for p in again.phases}["score backward"] - passes["score backward"]
    assert extra > 0.5 * (passes["score forward"] / 2)
    with pytest.raises(ValueError, match="memory_limit is 1000"):
        count_step(config(memory_limit=1000), lengths, model, model)
    with pytest.raises(ValueError, match="target: sequences of 112 tokens exceed the context"):
        count_step(config(response=SamplingParams(max_new_tokens=70)), lengths, model, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_facts_are_the_engines(family, tied, tiny_model_dir):
    folder = tiny_model_dir(family, tied=tied)
    facts = core.describe(str(folder))
    model = load_model(folder, threads=1)
    assert facts.has_weights and facts.lora_modules == model.lora_modules
    assert facts.config == {key: model.config[key] for key in facts.config}
    held = facts.matrix_bytes("cpu", "float32")
    assert sum(held.values()) == model.config["weight_bytes"]
    assert held["layers"] + held["head"] == model.config["streamed_bytes"]


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_facts_of_the_default_models_file(smollm2_path, compute):
    priced = find_priced("smollm2").held("cpu", compute)
    model = load_model(smollm2_path, threads=1, compute=compute)
    assert priced.source == "files"
    assert priced.facts.lora_modules == model.lora_modules
    assert priced.parameters == pytest.approx(134.5e6, rel=1e-3)
    assert priced.weight_bytes == model.config["weight_bytes"]
    assert priced.streamed_bytes == model.config["streamed_bytes"]


def test_facts_are_refused_by_name(small):
    facts = small().facts
    with pytest.raises(ValueError, match='device: expected "cpu" or "cuda", got "tpu"'):
        facts.matrix_bytes("tpu", "float32")
    with pytest.raises(ValueError, match='compute: expected "bfloat16" or "float32" on device'):
        facts.matrix_bytes("cuda", "int8")
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        core.describe("/")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("microsoft/Phi-3.5-mini-instruct", 3.82),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
    ],
)
def test_published_models_have_the_published_size(name, billions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = find_priced(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=4e-3)
    if model.source == "published":
        assert model.held("cpu", "float32").weight_bytes == 2 * model.parameters


def test_score_bytes_are_the_engines(smollm2):
    facts = core.describe(str(smollm2.path))
    policy = LoraPolicy.fresh(smollm2, LoraConfig(), seed=0)
    for mode in ("keep", "recompute"):
        for count, read, wrote in ((4, 60, 12), (2, 200, 40), (1, 500, 100)):
            sequences = [[1] * read + [5 + i] * wrote for i in range(count)]
            starts = [read] * count
            theirs = policy.score_bytes(sequences, starts, mode, with_reference=True)
            ours = facts.score_bytes(
                sequences,
                starts,
                modules=list(facts.lora_modules),
                rank=16,
                with_reference=True,
                activations=mode,
                threads=smollm2.config["threads"],
            )
            assert ours == theirs, (mode, count)


def test_one_real_step(smollm2, tmp_path):
    # An engine of its own: one that served other tests has the beginnings of these prompts cached.
    smollm2 = load_model(smollm2.path)
    settings = forced_lengths(
        config(
            steps=1,
            run_dir=str(tmp_path / "run"),
            rewrite=SamplingParams(max_new_tokens=4),
            response=SamplingParams(max_new_tokens=3),
            lora=LoraConfig(),
        )
    )
    prompts = local_prompts(DataConfig("everyday"))[:2]

    def reward(prompts, rewrites, responses):
        return [float(len(response)) for response in responses]

    trainer = Trainer(
        settings,
        Pipeline.configured(settings, smollm2, smollm2, reward),
        LoraPolicy.fresh(smollm2, settings.lora, seed=0),
        prompts,
    )
    before = smollm2.stats()
    core.trace_start("ops")
    try:
        trainer.train()
    finally:
        events = core.trace_stop()
    after = smollm2.stats()
    (row,) = read_metrics(trainer.run_dir / "metrics.jsonl")

    tokenizer = smollm2.tokenizer
    lengths = find_lengths(prompts, Prompting(), 4, tokenizer, tokenizer)
    model = find_priced("smollm2").held("cpu", "float32")
    work = count_step(settings, lengths, model, model)
    assert work.tokens["generated"] == row["generated_tokens"]
    read = work.tokens["prompter reads"] + work.tokens["target reads"]
    assert read == pytest.approx(after["prefill_tokens"] - before["prefill_tokens"], rel=0.2)

    def counted(what, *names):
        chosen = [i for i, name in enumerate(events["names"]) if name in names]
        return float(events[what][np.isin(events["name"], chosen)].sum())

    # The trace counts rows and operations of every forward; the engine's have a span of their own.
    layers = model.facts.config["num_layers"]
    scored = counted("rows", "linear o") / layers - counted("rows", "forward")
    # Short rewrites of one prompt often begin alike, and the engine computes that once.
    assert scored <= work.tokens["scored forward"] <= 1.15 * scored
    phases = {phase.name: phase for phase in work.phases}
    ours = phases["score forward"].flops
    ours += sum(phase.flops for phase in work.phases if phase.kind == "generate")
    linears = ("linear qkv", "linear o", "linear gate_up", "linear down")
    theirs = counted("flops", *linears, "attention", "head_sample")
    assert ours == pytest.approx(theirs, rel=0.1)


def test_a_mixture_as_target_has_a_lane_for_each_adapter(small, tmp_path):
    folder = tmp_path / "mixed"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    members = {"a": 0.5, "base": 0.5, "b": 0.0}
    (folder / "mixture.json").write_text(json.dumps({"members": members}))
    model, lengths = small(), Lengths(10, 7, 12, 6, 2, 8, source="")
    works = [
        count_step(config(target=ModelConfig(adapter=adapter)), lengths, model, model)
        for adapter in (None, str(folder))
    ]
    one, two = ({phase.name: phase for phase in work.phases} for work in works)
    assert one["prompter writes"] == two["prompter writes"]
    for name, drawn in (("target reads", 12), ("target writes", 12 * 3)):  # heads' rows
        head = 2 * drawn * model.facts.head_parameters
        assert two[name].rows == 2 * one[name].rows
        assert two[name].flops - head == 2 * (one[name].flops - head)
        assert two[name].kv_elements == 2 * one[name].kv_elements
        assert two[name].least_weight_bytes == one[name].least_weight_bytes
    assert works[1].tokens["generated"] == works[0].tokens["generated"]
    assert works[1].kv_elements > works[0].kv_elements
