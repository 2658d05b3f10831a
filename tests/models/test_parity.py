"""Sampled minus scored log-probability is 0.0 for every token, whatever runs beside it.

Training recomputes what was sampled; a difference in the last bit would be a policy gradient of
another policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from alignpro import NumericError
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel, load_model
from alignpro.ops import linear_logprob
from alignpro.types import Completion, SamplingParams
from model_variants import VARIANTS, variant_folder
from native_runs import drain

TEMPERATURES = (0.7, 1.0, 1.3)
Engines = Callable[..., NativeModel]


@pytest.fixture(scope="module")
def engine(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Engines:
    """``engine(variant, **options of load_model)``, each made once."""
    made: dict[Any, NativeModel] = {}
    root = tmp_path_factory.mktemp("variants")

    def make(name: str, **options: Any) -> NativeModel:
        key = (name, *sorted(options.items()))
        if key not in made:
            folder = variant_folder(VARIANTS[name], tiny_model_dir, root)
            made[key] = load_model(folder, context_length=VARIANTS[name].context, **options)
        return made[key]

    return make


def adapter(model: NativeModel, kind: str) -> LoraWeights | None:
    """none, all, rslora, or some: two linears in each of two layers."""
    if kind == "none":
        return None
    draw = np.random.default_rng(3)
    rank = 5
    return LoraWeights(
        rank=rank,
        alpha=8.0,
        rslora=kind == "rslora",
        matrices={
            name: (
                (draw.normal(size=(rank, inputs)) / inputs**0.5).astype(np.float32),
                (0.3 * draw.normal(size=(outputs, rank))).astype(np.float32),
            )
            for name, (outputs, inputs) in model.lora_modules.items()
            if kind != "some" or ("layers.1" not in name and name.endswith(("o_proj", "down_proj")))
        },
    )


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 45 tokens, a third of them with a common beginning; three temperatures."""
    draw = np.random.default_rng(11)
    common = draw.integers(3, 111, 34).tolist()
    prompts = []
    for i in range(count):
        own = draw.integers(3, 111, 1 + (7 * i) % 45).tolist()
        prompts.append([*common, *own[:11]] if i % 3 == 0 else own)
    return prompts, [
        SamplingParams(
            max_new_tokens=6 + i % 4, temperature=TEMPERATURES[i % 3], seed=i, ignore_eos=True
        )
        for i in range(count)
    ]


def scored(
    model: NativeModel,
    completions: Sequence[Completion],
    params: Sequence[SamplingParams],
    lora: Any,
) -> list[list[float]]:
    """The completions' log-probabilities by the scorer, those of one temperature in one call."""
    result: list[list[float]] = [[] for _ in completions]
    for temperature in {p.temperature for p in params}:
        chosen = [i for i, p in enumerate(params) if p.temperature == temperature]
        sequences = [completions[i].prompt_tokens + completions[i].tokens for i in chosen]
        flat = model.score(sequences, adapter=lora, temperature=temperature)
        for i, values in zip(chosen, flat, strict=True):
            result[i] = values[len(completions[i].prompt_tokens) - 1 :].tolist()
    return result


def largest_difference(
    completions: Sequence[Completion], scores: Sequence[Sequence[float]]
) -> float:
    return max(
        abs(sampled - score)
        for completion, values in zip(completions, scores, strict=True)
        for sampled, score in zip(completion.logprobs, values, strict=True)
    )


def assert_same(some: Sequence[Completion], others: Sequence[Completion]) -> None:
    assert [(c.tokens, c.logprobs) for c in some] == [(c.tokens, c.logprobs) for c in others]


@pytest.mark.parametrize("kind", ["none", "all", "some", "rslora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_and_adapter(engine: Engines, variant: str, kind: str) -> None:
    shared = engine(variant, threads=2)
    bare = engine(variant, threads=1, prefix_cache=False, max_batch_rows=7)
    lora = adapter(shared, kind)
    prompts, params = requests(9)
    first = shared.generate(prompts, params, adapter=lora)
    # Sampled on two threads and scored on one, and the other way round.
    assert largest_difference(first, scored(bare, first, params, lora)) == 0.0
    assert largest_difference(first, scored(shared, first, params, lora)) == 0.0
    chunked = bare.generate(prompts, params, adapter=lora)
    assert_same(chunked, first)
    cached = shared.stats()["cached_tokens"]
    again = shared.generate(prompts, params, adapter=lora)
    assert shared.stats()["cached_tokens"] > cached
    assert_same(again, first)


@pytest.mark.parametrize("kind", ["none", "all"])
def test_every_batch_size(engine: Engines, kind: str) -> None:
    model = engine("llama", threads=2)
    lora = adapter(model, kind)
    prompts, params = requests(64)
    whole = model.generate(prompts, params, adapter=lora)
    scores = scored(model, whole, params, lora)
    assert largest_difference(whole, scores) == 0.0
    for size in range(1, 64):
        part = slice(size % 7, size % 7 + size)
        assert_same(model.generate(prompts[part], params[part], adapter=lora), whole[part])
        if size % 9 == 0:
            assert scored(model, whole[part], params[part], lora) == scores[part]


@pytest.mark.parametrize("variant", ["qwen2", "mistral-window", "phi3-longrope-long", "gemma3"])
def test_every_chunking_of_the_prefill(engine: Engines, variant: str) -> None:
    prompts, params = requests(5)
    prompts[2] = prompts[2] * 3 + prompts[1] * 9  # 117 tokens
    expected = engine(variant, threads=2).generate(prompts, params)
    scores = scored(engine(variant, threads=2), expected, params, None)
    assert largest_difference(expected, scores) == 0.0
    for rows in (1, 2, 3, 16, 17, 64):
        for prefix_cache in (False, True):
            model = engine(variant, threads=2, max_batch_rows=rows, prefix_cache=prefix_cache)
            assert_same(model.generate(prompts, params), expected)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral-window", "gemma3"])
def test_keys_and_values_as_float16(engine: Engines, variant: str) -> None:
    """Rounded alike in sampling and scoring, whatever the batch, the chunks or the prefix cache."""
    shared = engine(variant, threads=2, kv_dtype="float16")
    bare = engine(variant, threads=1, kv_dtype="float16", prefix_cache=False, max_batch_rows=7)
    lora = adapter(shared, "all")
    prompts, params = requests(9)
    prompts[2] = prompts[2] * 3 + prompts[1] * 9
    first = shared.generate(prompts, params, adapter=lora)
    assert largest_difference(first, scored(bare, first, params, lora)) == 0.0
    assert largest_difference(first, scored(shared, first, params, lora)) == 0.0
    assert_same(bare.generate(prompts, params, adapter=lora), first)
    cached = shared.stats()["cached_tokens"]
    assert_same(shared.generate(prompts, params, adapter=lora), first)
    assert shared.stats()["cached_tokens"] > cached
    # Not what float32 gives, but near it.
    plain = scored(engine(variant, threads=2), first, params, lora)
    assert 0.0 < largest_difference(first, plain) < 0.05
    assert shared.config["kv_dtype"] == "float16"


def test_float16_keys_and_values_halve_the_cache_and_have_no_gradients(engine: Engines) -> None:
    size = 64 * 16 * 2 * 3 * 2 * 12 * 4
    plain = engine("llama", threads=2, kv_cache_bytes=size)
    halves = engine("llama", threads=2, kv_cache_bytes=size, kv_dtype="float16")
    capacity = plain.stats()["kv_blocks_capacity"]
    assert halves.stats()["kv_blocks_capacity"] == 2 * capacity == 128
    lora = halves.make_adapter(adapter(halves, "some"))
    with pytest.raises(ValueError, match="gradients: expected a model loaded with kv_dtype"):
        halves.core_model.score([[3, 4, 5]], [1], adapter=lora, keep_graph=True)


def test_what_float16_cannot_hold_is_an_error(engine: Engines) -> None:
    """In sampling and in scoring; the engine is usable afterwards."""
    model = engine("llama", threads=2, kv_dtype="float16")
    name = "model.layers.1.self_attn.v_proj"
    outputs, inputs = model.lora_modules[name]
    matrices = {name: (np.full((1, inputs), 1e3, np.float32), np.ones((outputs, 1), np.float32))}
    matrices[name][0][0, ::2] = -3e4
    huge = LoraWeights(rank=1, alpha=1e3, rslora=False, matrices=matrices)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, seed=1)
    with pytest.raises(NumericError, match="kv_dtype float16: expected keys and values of at most"):
        model.generate([[5, 6, 7]], params, adapter=huge)
    client = model.client()
    bad, good = (client.submit([5, 6, 7], params, adapter=a) for a in (huge, None))
    drain(client)
    with pytest.raises(NumericError, match="kv_dtype float16: "):
        bad.completion()
    assert good.completion() == model.generate([[5, 6, 7]], params)[0]
    with pytest.raises(NumericError, match="load the model with kv_dtype float32"):
        model.score([[5, 6, 7]], adapter=huge)
    assert len(model.generate([[5, 6, 7]], params)[0].tokens) == 4


def test_adapters_and_arrivals_mixed_in_one_batch(engine: Engines) -> None:
    model = engine("qwen3", threads=2)
    prompts, params = requests(24)
    kinds = [("none", "all", "some", "rslora")[i % 4] for i in range(24)]
    loras = {kind: adapter(model, kind) for kind in kinds}
    handles, client = [], model.client()
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        handles.append(client.submit(prompt, one, adapter=loras[kinds[i]]))
        if i % 3 == 2:
            client.step()
    drain(client)
    completions = [handle.completion() for handle in handles]
    for kind, lora in loras.items():
        chosen = [i for i in range(24) if kinds[i] == kind]
        mine, theirs = [completions[i] for i in chosen], [params[i] for i in chosen]
        assert largest_difference(mine, scored(model, mine, theirs, lora)) == 0.0
        assert_same(mine, model.generate([prompts[i] for i in chosen], theirs, adapter=lora))


def test_a_crowded_cache(engine: Engines) -> None:
    """Sequences wait for blocks, and cached beginnings are thrown out and computed again."""
    roomy = engine("llama", threads=2)
    per_token = 2 * 3 * 2 * 12 * 4  # keys and values, layers, heads, width, bytes
    crowded = engine("llama", threads=2, kv_cache_bytes=8 * 16 * per_token)
    prompts, params = requests(24)
    expected = roomy.generate(prompts, params)
    got = crowded.generate(prompts, params)
    stats = crowded.stats()
    assert stats["kv_blocks_capacity"] == 8 and stats["steps"] > 40
    assert 0 < stats["cached_tokens"] < 150  # 238 with room for all
    assert_same(got, expected)
    assert largest_difference(got, scored(crowded, got, params, None)) == 0.0


@pytest.mark.parametrize("variant", ["llama", "phi3"])
def test_scores_do_not_depend_on_what_is_asked_for(engine: Engines, variant: str) -> None:
    """Company, starts, a reference, a graph, recomputing and threads change no bit."""
    model, other = engine(variant, threads=2), engine(variant, threads=1)
    policy, held = adapter(model, "all"), adapter(model, "some")
    prompts, params = requests(12)
    same = [replace(p, temperature=0.7) for p in params]
    completions = model.generate(prompts, same, adapter=policy)
    sequences = [c.prompt_tokens + c.tokens for c in completions]
    starts = [len(c.prompt_tokens) for c in completions]
    sampled = np.array([p for c in completions for p in c.logprobs], np.float32)

    def score(on: NativeModel, lora: Any, **options: Any) -> Any:
        return on.core_model.score(
            sequences, starts, adapter=on.make_adapter(lora), temperature=0.7, **options
        )

    expected = score(model, policy)
    assert np.array_equal(expected.logprob, sampled)
    for on in (model, other):
        reference = on.make_adapter(held)
        for options in (
            {"keep_graph": True},
            {"keep_graph": True, "activations": "recompute"},
            {"reference": reference, "with_reference": True},
            {"reference": reference, "with_reference": True, "keep_graph": True},
        ):
            got = score(on, policy, **options)
            assert np.array_equal(got.logprob, sampled)
            assert np.array_equal(got.entropy, expected.entropy)
            if "reference" in options:  # which is the score under that adapter, to the bit
                assert np.array_equal(got.reference_logprob, score(model, held).logprob)
    for i, sequence in enumerate(sequences):
        (alone,) = other.score([sequence], adapter=policy, temperature=0.7)
        assert alone[starts[i] - 1 :].tolist() == completions[i].logprobs


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_what_the_tokens_were_predicted_from(
    engine: Engines, tiny_model_dir: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    """The vocabulary op on the hidden states gives the scores back, to the bit."""
    model = engine(variant, threads=2)
    policy = adapter(model, "all")
    prompts, params = requests(6)
    completions = model.generate(prompts, params, adapter=policy)
    sequences = [c.prompt_tokens + c.tokens for c in completions]
    starts = [len(c.prompt_tokens) for c in completions]

    def score(**options: Any) -> Any:
        return model.core_model.score(
            sequences, starts, adapter=model.make_adapter(policy), temperature=0.7, **options
        )

    assert score().hidden is None
    folder = variant_folder(VARIANTS[variant], tiny_model_dir, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for options in ({}, {"keep_graph": True}, {"with_reference": True}):
        scores = score(with_hidden=True, **options)
        assert scores.hidden.shape == (len(scores.logprob), model.core_model.config["hidden_size"])
        again = linear_logprob(
            torch.from_numpy(scores.hidden),
            torch.from_numpy(head.astype(np.float32)),
            torch.tensor([t for s, i in zip(sequences, starts, strict=True) for t in s[i:]]),
            temperature=0.7,
        )
        assert np.array_equal(again.logprob.numpy(), scores.logprob)
        assert np.array_equal(again.entropy.numpy(), scores.entropy)


def test_the_last_bit_of_a_weight_or_of_the_temperature_shows(engine: Engines) -> None:
    model = engine("llama", threads=2)
    lora = adapter(model, "all")
    assert lora is not None
    prompts, params = requests(9)
    completions = model.generate(prompts, params, adapter=lora)
    matrices = dict(lora.matrices)
    name = "model.layers.0.self_attn.q_proj"
    a, b = matrices[name]
    b = b.copy()
    b[:, 0] = np.nextafter(b[:, 0], np.float32(9))
    matrices[name] = (a, b)
    nudged = scored(model, completions, params, replace(lora, matrices=matrices))
    assert 0.0 < largest_difference(completions, nudged) < 1e-3
    warmer = [
        replace(p, temperature=float(np.nextafter(np.float32(p.temperature), np.float32(9))))
        for p in params
    ]
    assert 0.0 < largest_difference(completions, scored(model, completions, warmer, lora)) < 1e-3
