"""``load_model(device="cuda")`` where the device is emulated, beside the CPU engine: every family,
adapters, and what a user may ask for and may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignpro import native
from alignpro.config import ModelConfig
from alignpro.models.adapter import LoraWeights
from alignpro.models.mixture import Mixture, score_tokens
from alignpro.models.native_model import NativeModel, load_model, load_models
from alignpro.types import SamplingParams
from model_variants import VARIANTS, variant_folder
from native_runs import draw_ids

PROMPTS = [[1, 40, 9, 77], [1, 40, 9, 77, 8], [30, 31]]
# float32 sums in another order, through three layers: a few 1e-6.
BUDGET = 2e-5


def lora(model: NativeModel, rank: int) -> LoraWeights:
    random = np.random.default_rng(5)
    matrices = {
        path: (
            (random.standard_normal((rank, inputs)) * 0.1).astype(np.float32),
            (random.standard_normal((outputs, rank)) * 0.3).astype(np.float32),
        )
        for path, (outputs, inputs) in model.lora_modules.items()
    }
    return LoraWeights(rank=rank, alpha=2.0 * rank, rslora=False, matrices=matrices)


@pytest.fixture(scope="module")
def llama(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_says_what_it_says_on_the_cpu(name, tiny_model_dir, tmp_path):
    variant = VARIANTS[name]
    folder = variant_folder(variant, tiny_model_dir, tmp_path)
    cpu = load_model(folder, threads=1, context_length=variant.context)
    device = load_model(
        folder, device="cuda", compute="float32", context_length=variant.context, max_batch_rows=9
    )
    assert (cpu.config["device"], device.config["device"]) == ("cpu", "cuda")
    params = SamplingParams(max_new_tokens=3, temperature=0.8, seed=3, ignore_eos=True)
    adapter = lora(cpu, 3)
    expected = cpu.generate(PROMPTS, params, adapter=adapter)
    got = device.generate(PROMPTS, params, adapter=adapter)
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=BUDGET)
        assert ours.kept_mass == [1.0] * 3
    again = device.core_model.score(
        [prompt + c.tokens for prompt, c in zip(PROMPTS, got, strict=True)],
        [len(prompt) for prompt in PROMPTS],
        adapter=device.make_adapter(adapter),
        temperature=0.8,
    )
    assert again.logprob.tolist() == [x for c in got for x in c.logprobs]


def test_mixtures_are_the_cpus(llama):
    """Of two adapters, and of one and the base weights, whose steps are graphs."""
    cpu = load_model(llama, threads=1)
    device = load_model(llama, device="cuda", compute="float32", max_batch_rows=9)
    params = SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, ignore_eos=True)
    one, other = lora(cpu, 3), replace(lora(cpu, 2), alpha=1.0)
    for mixture in (Mixture(((one, 0.7), (other, 0.3))), Mixture(((one, 1.5), ("base", -0.5)))):
        expected = cpu.generate(PROMPTS, params, adapter=mixture)
        got = device.generate(PROMPTS, params, adapter=mixture)
        assert [c.tokens for c in got] == [c.tokens for c in expected]
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=BUDGET)
        again = score_tokens(
            device,
            [prompt + c.tokens for prompt, c in zip(PROMPTS, got, strict=True)],
            [len(prompt) for prompt in PROMPTS],
            adapter=mixture,
            temperature=0.8,
        )
        assert again.logprob.tolist() == [x for c in got for x in c.logprobs]


def test_soft_rows_are_the_cpus(llama):
    """Drawn, scored to the bit, with gradients; alone and beside LoRA."""
    cpu = load_model(llama, threads=1)
    device = load_model(llama, device="cuda", compute="float32", max_batch_rows=9)
    params = SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, ignore_eos=True)
    rows = np.random.default_rng(1).normal(size=(3, cpu.config["hidden_size"])) * 0.05
    prompts = [[-1, -2, 1, 40, 9, -3], [-1, -2, 1, 40, 9, -3, 8], [-3]]
    upstream = np.random.default_rng(2).normal(size=12).astype(np.float32)
    gradients = []
    for weights in (None, lora(cpu, 3)):
        matrices, scale = ({}, 1.0) if weights is None else (weights.matrices, weights.scale)
        drawn = []
        for model in (cpu, device):
            made = model.core_model.make_adapter(matrices, scale, rows.astype(np.float32))
            for _ in range(2):  # the second time from the cache: a row is a decoding step's token
                got = draw_ids(model, prompts, params, made)
                drawn.append(([c.tokens for c in got], [x for c in got for x in c.logprobs]))
            scored = model.core_model.score(
                [prompt + c.tokens for prompt, c in zip(prompts, got, strict=True)],
                [len(prompt) for prompt in prompts],
                adapter=made,
                temperature=0.8,
                keep_graph=True,
            )
            assert scored.logprob.tolist() == drawn[-1][1]
            gradients.append(scored.backward(upstream, None, None)["rows"])
        assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0][0] == drawn[2][0]
        np.testing.assert_allclose(drawn[0][1], drawn[2][1], rtol=0, atol=BUDGET)
        assert np.linalg.norm(gradients[-1] - gradients[-2]) < 5e-5 * np.linalg.norm(gradients[-2])


def test_bfloat16_is_the_default_and_near(tmp_path):
    import torch
    import transformers

    from conftest import save_tiny_tokenizer

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=111, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config.initializer_range = 0.1
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    device = load_model(tmp_path, device="cuda")
    assert (device.config["compute"], device.config["kv_dtype"]) == ("bfloat16", "bfloat16")
    tokens = [5, 9, 30, 31, 70, 8, 2, 90, 100, 14]
    with torch.no_grad():
        ids = torch.tensor([tokens])

        def logprobs(of: torch.dtype) -> np.ndarray:
            logits = model.to(of)(ids).logits[0, :-1].double()
            chosen = torch.log_softmax(logits, 1).gather(1, ids[0, 1:, None])[:, 0]
            return chosen.numpy()

        plain, exact = logprobs(torch.bfloat16), logprobs(torch.float64)
    ours = device.score([tokens])[0]
    # As the ops are judged: at most twice as far from float64 as plain torch in bfloat16.
    assert np.linalg.norm(ours - exact) <= 2 * np.linalg.norm(plain - exact)
    assert np.linalg.norm(ours - exact) > 0


def test_truncated_draws_are_the_cpus(llama):
    """Plain rows and truncated ones in one batch; a ban is what min_new_tokens makes."""
    cpu = load_model(llama, threads=1)
    device = load_model(llama, device="cuda", compute="float32")
    limits = ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"min_new_tokens": 4})
    params = [
        SamplingParams(max_new_tokens=4, temperature=1.2, seed=i, **limit)
        for i, limit in enumerate(limits)
    ]
    prompts = [[1, 2 + i] for i in range(len(limits))]
    got, expected = (model.generate(prompts, params) for model in (device, cpu))
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    for mine, truth in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs, truth.logprobs, atol=2e-5)
        np.testing.assert_allclose(mine.kept_mass, truth.kept_mass, atol=2e-5)
    assert [min(c.kept_mass) < 1.0 for c in got] == [False, True, True, True, True]


def test_what_a_device_cannot_do_is_one_line(llama):
    device = load_model(llama, device="cuda", compute="float32")
    with pytest.raises(ValueError, match="keep_graph needs an adapter"):
        device.core_model.score([[1, 2]], [1], keep_graph=True)
    with pytest.raises(
        ValueError, match=r"prompt 0: .*penalties: device .cuda.* draws without them"
    ):
        device.generate([[1, 2]], SamplingParams(max_new_tokens=2, repetition_penalty=1.1))
    for options, text in (
        ({"compute": "int8"}, "compute: expected bfloat16 or float32 with device cuda"),
        ({"kv_dtype": "float16"}, "kv_dtype: expected bfloat16 with device cuda"),
        ({"deterministic": "quick"}, "deterministic: expected true or false, got 'quick'"),
        ({"compute": "bfloat16"}, "intermediate_size: expected a multiple of 8 in BF16"),
    ):
        with pytest.raises(ValueError, match=text):
            load_model(llama, device="cuda", **options)


def test_models_of_two_devices_are_two(llama):
    prompter, target = load_models(
        ModelConfig(llama), ModelConfig(device="cuda", compute="float32"), 1
    )
    assert (prompter.config["device"], target.config["device"]) == ("cpu", "cuda")
    same, too = load_models(ModelConfig(llama), None, 1)
    assert same is too


def test_what_is_not_deterministic_measures_what_it_costs(llama):
    """The emulated library's sums go by the number of rows, as cuBLASLt's may."""
    strict, fast = (
        load_model(llama, device="cuda", compute="float32", deterministic=deterministic)
        for deterministic in (True, False)
    )
    assert (strict.config["deterministic"], fast.config["deterministic"]) == (True, False)
    assert strict.bit_exact and not fast.bit_exact and load_model(llama, threads=1).bit_exact
    params = SamplingParams(max_new_tokens=4, temperature=0.8, seed=3, ignore_eos=True)
    adapter = lora(fast, 3)
    for with_ in (None, adapter):
        completions = fast.generate(PROMPTS, params, adapter=with_)
        sampled = np.concatenate([c.logprobs for c in completions])
        request = (
            [prompt + c.tokens for prompt, c in zip(PROMPTS, completions, strict=True)],
            [len(prompt) for prompt in PROMPTS],
        )
        scored, truth = (
            model.core_model.score(
                *request,
                adapter=None if with_ is None else model.make_adapter(with_),
                temperature=0.8,
            ).logprob
            for model in (fast, strict)
        )
        assert 0 < np.abs(scored - sampled).max() < BUDGET
        assert 0 < np.abs(scored - truth).max() < BUDGET
    on_device = ModelConfig(device="cuda", compute="float32")
    prompter, target = load_models(ModelConfig(llama), on_device, 1)
    assert target.bit_exact and prompter.bit_exact
    _, quick = load_models(ModelConfig(llama), replace(on_device, deterministic=False), 1)
    assert not quick.bit_exact


def test_the_bound_of_a_target_that_is_not_deterministic_says_how_far_it_is_off(llama):
    from alignpro.config import BoundConfig
    from alignpro.data.load import PromptRow
    from alignpro.evaluate.bound import measure_bound

    config = BoundConfig(
        num_rewrites=2,
        num_responses=1,
        rewrite=SamplingParams(max_new_tokens=3, temperature=1.0),
        response=SamplingParams(max_new_tokens=3, temperature=1.0),
    )
    rows = [PromptRow("ab cd"), PromptRow("e")]

    def reward(prompts, rewrites, responses):
        return [float(len(text) % 3) for text in responses]

    off = {}
    for deterministic in (True, False):
        model = load_model(llama, device="cuda", compute="float32", deterministic=deterministic)
        off[deterministic] = measure_bound(config, model, model, reward, rows).parity_max_abs
    assert off[True] is None and 0 < off[False] < BUDGET


def test_threads_and_streams_share_a_device(llama):
    device = load_model(llama, device="cuda", compute="float32")
    params = SamplingParams(max_new_tokens=3, seed=1, temperature=1.0, ignore_eos=True)
    whole = device.generate([[4, 5, 6]], params)[0]
    pieces = list(device.stream([4, 5, 6], params))
    assert [p[0] for p in pieces] == whole.tokens
    assert [p[2] for p in pieces] == whole.logprobs
    assert device._engine.idle() and device.stats()["cached_tokens"] > 0
    assert native.core.cuda.is_available()
