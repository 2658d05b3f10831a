"""Digests of what the engine computes with SmolLM2 on the CPU, recorded once: tokens, log-
probabilities, entropy, KL and gradients. A change of structure changes no bit; a change of
arithmetic records them anew and says so. AVX2 and AVX-512 give equal bits; the generic kernels do
not fuse multiply and add, and are not compared. tests/cpp/digest_test.cc has the same of a random
model, where there is no SmolLM2."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from alignpro import SamplingParams, native
from alignpro.models.native_model import NativeModel, load_model

RECORDED = {
    ("float32", "float32"): {
        "tokens base": "b72a849ae97dbdce",
        "sampled base": "3bd3cb1eaa27a230",
        "tokens adapted": "9ef6bbba673deb3c",
        "sampled adapted": "69791e3690071ed5",
        "logprob": "567c4abc10fc04f3",
        "entropy": "dac91565413700ed",
        "kl": "f545e7e67e8869f8",
        "reference_logprob": "4c8f0f832d057dca",
        "hidden": "c9741e366588ff26",
        "gradients": "b1514f059971ae28",
    },
    ("int8", "float32"): {
        "tokens base": "137746b2bd4851bd",
        "sampled base": "39af8dd45a00d803",
        "tokens adapted": "7f32db96c25b2316",
        "sampled adapted": "2153b88b9e4e3dd2",
        "logprob": "b228c8077ccc93fc",
        "entropy": "de68624f4f3104e0",
        "kl": "ea0bae4bf489f3c4",
        "reference_logprob": "6ef8486e79ac1d27",
        "hidden": "790e0710d34a66b7",
    },
    ("float32", "float16"): {
        "tokens base": "f5942f086eb33f5f",
        "sampled base": "317d46e37b26a8d3",
        "tokens adapted": "e75234cf5a5e495a",
        "sampled adapted": "c57b0be8257b2a59",
        "logprob": "79bf922751d52d77",
        "entropy": "571e9720f8352c0d",
        "kl": "b5cbd40bb8d8f95a",
        "reference_logprob": "098623ccd4046bb4",
        "hidden": "0bb6607cb36ab8ae",
    },
}


def digest(*arrays) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def adapter(model: NativeModel, seed: int):
    draw = np.random.default_rng(seed)
    matrices = {}
    for path, (outputs, inputs) in model.lora_modules.items():
        a = draw.standard_normal((4, inputs)).astype(np.float32) * np.float32(0.02)
        b = draw.standard_normal((outputs, 4)).astype(np.float32) * np.float32(0.02)
        matrices[path] = (a, b)
    return model.core_model.make_adapter(matrices, 2.0)


def sequences() -> tuple[list[list[int]], list[int]]:
    draw = np.random.default_rng(7)
    start = draw.integers(100, 40000, 37).tolist()
    all_ = [start + draw.integers(100, 40000, 5 + 4 * i).tolist() for i in range(3)]
    all_.append(draw.integers(100, 40000, 11).tolist())
    return all_, [37, 37, 40, 1]


def digests(model: NativeModel, *, trains: bool) -> dict[str, str]:
    policy, reference = adapter(model, 1), adapter(model, 2)
    prompts, starts = sequences()
    found = {}
    params = [
        SamplingParams(
            max_new_tokens=12,
            seed=i,
            ignore_eos=True,
            temperature=0.0 if i == 0 else 0.9,
            top_p=0.8 if i == 2 else 1.0,
        )
        for i in range(len(prompts))
    ]
    for name, with_adapter in (("base", None), ("adapted", policy)):
        done = model.generate(prompts, params, adapter=with_adapter)
        found[f"tokens {name}"] = digest(*(np.array(one.tokens, np.int32) for one in done))
        found[f"sampled {name}"] = digest(*(np.array(one.logprobs, np.float32) for one in done))
    for activations in ("keep", "recompute"):
        score = model.core_model.score(
            prompts,
            starts,
            adapter=policy,
            temperature=0.9,
            reference=reference,
            with_reference=True,
            keep_graph=trains,
            activations=activations,
            with_hidden=True,
        )
        for key in ("logprob", "entropy", "kl", "reference_logprob", "hidden"):
            found[f"{key} {activations}"] = digest(getattr(score, key))
        if not trains:
            continue
        count = len(score.logprob)
        up = [np.linspace(-1, 1, count, dtype=np.float32) * np.float32(k) for k in (1, 2, 3)]
        gradients = score.backward(*up)
        found[f"gradients {activations}"] = digest(
            *(array for key in sorted(gradients) for array in gradients[key])
        )
    for key in [key for key in found if key.endswith(" recompute")]:  # the same bits
        assert found.pop(key) == found[key.replace(" recompute", " keep")], key
    return {key.removesuffix(" keep"): value for key, value in found.items()}


@pytest.mark.parametrize(("compute", "kv_dtype"), list(RECORDED))
def test_the_bits_are_those_recorded(smollm2_path, compute, kv_dtype):
    if native.core.cpu_isa() == "generic":
        pytest.skip("the generic kernels do not fuse multiply and add")
    model = load_model(smollm2_path, compute=compute, kv_dtype=kv_dtype)
    trains = (compute, kv_dtype) == ("float32", "float32")
    assert digests(model, trains=trains) == RECORDED[compute, kv_dtype]
