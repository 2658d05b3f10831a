"""Drafts that are looked up change when tokens come, and no bit of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpro.models.native_client import NativeHandle
from alignpro.models.native_model import NativeModel, load_model
from alignpro.types import SamplingParams
from model_variants import VARIANTS, variant_folder
from native_runs import SHORT, lora

Request = tuple[list[int], SamplingParams, int]  # prompt, how it is drawn, which adapter


def requests(count: int, seed: int) -> Iterator[Request]:
    """Prompts that hold a phrase twice or more, a quarter of them asked before; sharp and flat
    temperatures, truncated draws, stop ids and strings, limits, penalties."""
    draw = np.random.default_rng(seed)
    asked: list[Request] = []
    for index in range(count):
        if asked and draw.random() < 0.25:
            prompt, params, adapter = asked[draw.integers(len(asked))]
            if draw.random() < 0.5:
                params = replace(params, seed=int(draw.integers(100)))
            yield prompt, params, adapter
            continue
        phrase = draw.integers(5, 111, draw.integers(1, 9)).tolist()
        prompt = (phrase * int(draw.integers(2, 5)))[: int(draw.integers(1, 40))]
        most = int(draw.integers(1, 25))
        params = SamplingParams(
            max_new_tokens=most,
            min_new_tokens=int(draw.integers(0, most + 1)) if draw.random() < 0.3 else 0,
            temperature=float(draw.choice([0.0, 0.05, 0.2, 1.0])),
            top_p=float(draw.choice([1.0, 1.0, 0.8])),
            top_k=int(draw.choice([0, 0, 5])),
            min_p=float(draw.choice([0.0, 0.0, 0.1])),
            seed=index,
            stop_token_ids=tuple(draw.integers(0, 111, 3).tolist()) if draw.random() < 0.3 else (),
            stop=("th", "e") if draw.random() < 0.1 else (),
            ignore_eos=bool(draw.random() < 0.7),
            presence_penalty=0.5 if draw.random() < 0.05 else 0.0,
        )
        asked.append((prompt, params, int(draw.integers(3))))
        yield asked[-1]


def outcome(handle: NativeHandle) -> tuple[Any, ...]:
    done = handle.completion()
    return done.tokens, done.logprobs, done.kept_mass, done.finish_reason, done.text


def written(model: NativeModel, asked: list[Request], at_once: int) -> list[tuple[Any, ...]]:
    """What came of each, ``at_once`` in the engine; a neighbour is cancelled now and then."""
    adapters = [None, lora(model, 1), lora(model, 2)]
    client = model.client()
    outcomes: dict[int, tuple[Any, ...]] = {}
    waiting = list(enumerate(asked))[::-1]
    numbers: dict[NativeHandle, int] = {}
    while waiting or not client.idle():
        while waiting and len(numbers) < at_once:
            number, (prompt, params, adapter) = waiting.pop()
            handle = client.submit(prompt, params, adapter=adapters[adapter])
            numbers[handle] = number
            if number % 50 == 7:  # the same once more, which ends in the middle
                client.submit(prompt, replace(params, seed=1), adapter=adapters[adapter]).cancel()
        for handle in client.step():
            if handle in numbers:
                outcomes[numbers.pop(handle)] = outcome(handle)
    return [outcomes[number] for number in range(len(asked))]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {}),
        ("mistral-window", {}),
        ("phi3", {}),
        ("qwen3", {"kv_dtype": "float16"}),
    ],
)
def test_tokens_and_log_probabilities_are_those_of_plain_decoding(
    variant: str,
    options: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = variant_folder(VARIANTS[variant], tiny_model_dir, tmp_path)
    asked = list(requests(250, seed=4)) * 2  # the second time what was written is remembered
    plain = load_model(folder, threads=1, lookup=False, **options)
    expected = written(plain, asked, at_once=8)
    assert plain.stats()["drafted_tokens"] == 0
    for at_once, more in ((1, {}), (3, {"prefix_cache": False}), (4, {"max_batch_rows": 9})):
        model = load_model(folder, threads=2, **options, **more)
        assert written(model, asked, at_once) == expected
        stats = model.stats()
        # How many depends on what this machine's steps take: 28 of 500 requests on a busy one.
        assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
        assert stats["kv_blocks_in_use"] == 0


def test_a_rewrite_that_was_asked_for_before_takes_few_steps(
    tiny_model_dir: Callable[..., Path],
) -> None:
    tiny = load_model(
        tiny_model_dir("llama"), threads=1
    )  # no busy minute taught it what steps cost
    params = replace(SHORT, max_new_tokens=30, temperature=1.0)
    adapter = lora(tiny, 7)

    def steps(with_adapter: Any) -> int:
        before = tiny.stats()["steps"]
        tiny.generate([[5, 6, 7, 8, 9]], params, adapter=with_adapter)
        return int(tiny.stats()["steps"] - before)

    first = steps(adapter)
    assert steps(adapter) < first / 2
    assert steps(lora(tiny, 7)) > first / 2  # the same weights loaded again: another version


def test_int8_drafts_change_no_bit(smollm2_path: Path) -> None:
    prompt = "Repeat: one two three four, one two three four, one two three four."
    params = SamplingParams(max_new_tokens=24, temperature=0.7, seed=5, ignore_eos=True, top_p=0.9)
    done = []
    for lookup in (False, True):
        model = load_model(smollm2_path, compute="int8", threads=1, lookup=lookup)
        done.append(model.generate([prompt], params)[0])
    assert done[0] == done[1]
    assert model.stats()["accepted_tokens"] > 0
