"""A request fails alone: its error is its own, and the others go on with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel, load_model
from alignpro.native import NumericError
from alignpro.types import Completion, SamplingParams
from native_runs import SHORT, assert_settles, drain, lora


def broken_lora(model: NativeModel, value: float) -> LoraWeights:
    weights = lora(model)
    matrices = {name: (a.copy(), b) for name, (a, b) in weights.matrices.items()}
    for a, _ in matrices.values():
        a[0, 0] = value
    return replace(weights, matrices=matrices)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_an_adapter_without_numbers_fails_its_own_requests(tiny: NativeModel, value: float) -> None:
    prompts = [[5 + i, 6, 7] for i in range(6)]
    params = [replace(SHORT, seed=i, top_k=5 if i % 2 else 0) for i in range(6)]
    want = tiny.generate(prompts, params)
    client = tiny.client()
    bad = [
        client.submit([5, 6, 7 + i], replace(SHORT, top_k=3 * i), adapter=broken_lora(tiny, value))
        for i in range(2)
    ]
    assert tiny.generate(prompts, params) == want
    assert set(drain(client)) == set(bad)
    for handle in bad:
        with pytest.raises(NumericError, match="token 0 of the completion has no finite softmax"):
            handle.completion()
    # The blocks that held NaN are others' now.
    long = [[5] * 200, [6, 5] * 100]
    again = tiny.generate(long, SHORT)
    assert again == [tiny.generate([prompt], SHORT)[0] for prompt in long]
    assert_settles(tiny)


def test_errors_by_request(tiny: NativeModel) -> None:
    prompts: list[Any] = ["hello", [], [5, 6], "there", [1, 10**6], [5] * 999]
    params = [SHORT, SHORT, replace(SHORT, temperature=-1.0, n=2), replace(SHORT, n=2)]
    params += [SHORT, replace(SHORT, n=0)]
    got = tiny.generate(prompts, params, errors="return")
    assert len(got) == 1 + 1 + 2 + 2 + 1 + 1
    assert [got[0], *got[4:6]] == tiny.generate(["hello", "there"], [SHORT, params[3]])
    messages = [str(error) for error in got if not isinstance(error, Completion)]
    assert messages[0].startswith("prompt 1: prompt: expected at least one token")
    assert messages[1].startswith("prompt 2: temperature: ") and messages[2] == messages[1]
    assert messages[3].startswith("prompt 4: ") and "1000000" in messages[3]
    assert messages[4].startswith("prompt 5: n: ")
    assert {type(error) for error in got} == {Completion, ValueError}
    with pytest.raises(ValueError, match="prompt 1: "):
        tiny.generate(prompts, params)
    with pytest.raises(ValueError, match="errors: expected"):
        tiny.generate(prompts, params, errors="ignore")  # type: ignore[call-overload]
    assert_settles(tiny)


@pytest.fixture(scope="module")
def one_bad_token(tiny_model_dir: Callable[..., Path], tmp_path_factory: Any) -> NativeModel:
    """A model whose token 9 has an embedding of NaN."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("nan") / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].copy()
    table[9] = np.nan
    save_file({**tensors, "model.embed_tokens.weight": table}, folder / "model.safetensors")
    return load_model(folder, threads=2)


def test_a_row_of_nan_keeps_the_good_completions(one_bad_token: NativeModel) -> None:
    model = one_bad_token
    params = [SHORT, SHORT, replace(SHORT, temperature=0.0), replace(SHORT, n=2)]
    prompts = [[5, 6, 7], [5, 9, 7], [9], [6, 7]]
    got = model.generate(prompts, params, errors="return")
    good = [model.generate([prompts[i]], [params[i]]) for i in (0, 3)]
    assert [got[0], got[3], got[4]] == [*good[0], *good[1]]
    assert [str(e).split(" has no")[0] for e in got[1:3]] == [
        "prompt 1: sampling: token 0 of the completion",
        "prompt 2: sampling: token 0 of the completion",
    ]
    with pytest.raises(NumericError, match="prompt 1: sampling: token 0 of the completion"):
        model.generate(prompts, params)
    assert_settles(model)


def test_the_smallest_temperatures_fail_alone(tiny: NativeModel) -> None:
    for value in (1e-38, 1e-45, 1e-320):
        got = tiny.generate(
            ["hello", "hello"], [SHORT, replace(SHORT, temperature=value)], errors="return"
        )
        assert got[0] == tiny.generate(["hello"], SHORT)[0]
        assert isinstance(got[1], (ValueError, NumericError, Completion))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=3)
    assert isinstance(tiny.generate(["hello"], greedy, errors="return")[0], Completion)
