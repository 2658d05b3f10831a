"""The native model behind its Python face: prompts in, completions out, whatever goes wrong."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpro.models.adapter import save_peft
from alignpro.models.native_model import NativeModel, load_model
from alignpro.native import ModelFileError
from alignpro.types import SamplingParams
from conftest import FAMILIES
from native_runs import CHAT, SHORT, assert_settles, drain, lora

# --- loading ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_transformers_writes(
    tiny_model_dir: Callable[..., Path], family: str, tied: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir(family, tied=tied)
    model = load_model(folder)
    prompt = model.tokenizer.encode("the rain on the plain", add_bos=True)
    greedy = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
    (completion,) = model.generate([prompt], greedy)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sequence = torch.tensor([prompt + completion.tokens])
    with torch.no_grad():
        logits = oracle(sequence).logits[0, len(prompt) - 1 : -1]
    assert completion.tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).gather(-1, sequence[0, len(prompt) :, None])[:, 0]
    # float32 over three layers: about 1e-6; a wrong formula shows in the first digits.
    np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 1.3, "presence_penalty": -0.2, "frequency_penalty": 0.6},
    ],
    ids=str,
)
def test_penalties_choose_by_what_was_seen_and_logprobs_stay_the_models(
    tiny_model_dir: Callable[..., Path], given: dict[str, float]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir("llama")
    model = load_model(folder)
    prompt = model.tokenizer.encode("the rain on the plain", add_bos=True)
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    (plain,) = model.generate([prompt], params)
    (got,) = model.generate([prompt], replace(params, **given))
    assert got.tokens != plain.tokens
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + got.tokens])).logits[0, len(prompt) - 1 : -1]
    repetition = given.get("repetition_penalty", 1.0)
    for place, (row, token) in enumerate(zip(logits, got.tokens, strict=True)):
        changed, written = row.clone(), got.tokens[:place]
        for seen in set(prompt + written):
            changed[seen] = row[seen] / repetition if row[seen] > 0 else row[seen] * repetition
        for seen in set(written):
            changed[seen] -= given.get("presence_penalty", 0.0)
            changed[seen] -= given.get("frequency_penalty", 0.0) * written.count(seen)
        assert token == changed.argmax()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(got.tokens)[:, None])[:, 0]
    np.testing.assert_allclose(got.logprobs, expected.numpy(), atol=2e-5)


def test_the_default_model(smollm2: NativeModel) -> None:
    greedy = SamplingParams(max_new_tokens=16, temperature=0.0)
    (completion,) = smollm2.generate(["What is the capital of France?"], greedy)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"
    assert completion.tokens[-1] == smollm2.tokenizer.eos_ids[0]
    assert smollm2.context_length == 8192
    assert len(smollm2.lora_modules) == 210


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"compute": "int4"},
            "compute: expected one of 'float32', 'int8', 'bfloat16' or null, got 'int4'",
        ),
        (
            {"kv_dtype": "bfloat16"},
            "kv_dtype: expected float32 or float16 with device cpu, got 'bfloat16'",
        ),
        ({"device": "tpu"}, "device: expected one of 'cpu', 'cuda', got 'tpu'"),
        (
            {"device": "cuda", "compute": "int8"},
            "compute: expected bfloat16 or float32 with device cuda, got 'int8'",
        ),
        ({"threads": 0}, "threads: expected an integer from 1 to 1024, got 0"),
        ({"threads": 1.5}, "threads: expected an integer"),
        ({"threads": 10**6}, "threads: expected an integer from 1 to 1024"),
        ({"context_length": -1}, "context_length: expected at least 1 or null, got -1"),
        ({"kv_cache_bytes": 1}, "kv_cache_bytes: expected at least one block"),
        ({"max_batch_rows": 0}, "max_batch_rows: expected at least 1, got 0"),
    ],
)
def test_bad_load_arguments(
    tiny_model_dir: Callable[..., Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny_model_dir("llama"), **arguments)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16]
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model\.gguf") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model_dir("llama"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="safetensors"):
        load_model(folder)


def test_every_eos_id_ends_a_completion(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model_dir("llama"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5, 17]}', "utf-8")
    model = load_model(folder)
    params = SamplingParams(max_new_tokens=200, temperature=2.0, n=40, seed=1)
    completions = model.generate([CHAT], params)
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert {c.tokens[-1] for c in ended} == {2, 5, 17}
    assert not any({2, 5, 17} & set(c.tokens[:-1]) for c in completions)
    free = model.generate([CHAT], replace(params, ignore_eos=True))
    assert {c.finish_reason for c in free} == {"length"}


# --- prompts and parameters ---


def test_a_text_is_one_user_turn(tiny: NativeModel) -> None:
    tokens = tiny.tokenizer.encode_chat(CHAT)
    got = tiny.generate(["hello there", CHAT, tokens, np.array(tokens)], SHORT)
    assert all(c == got[0] for c in got)
    assert got[0].prompt_tokens == tokens
    assert len(got[0].tokens) == len(got[0].logprobs) == len(got[0].kept_mass) == 12


def test_samples_come_prompt_by_prompt(tiny: NativeModel) -> None:
    params = replace(SHORT, n=3)
    got = tiny.generate(["hello", "there"], params)
    alone = [tiny.generate([prompt], params) for prompt in ("hello", "there")]
    assert got == [c for group in alone for c in group]
    assert len({tuple(c.tokens) for c in got}) == 6
    client = tiny.client()
    handle = client.submit(tiny.tokenizer.encode_chat([{"role": "user", "content": "there"}]),
                         SHORT, sample=2)  # fmt: skip
    assert drain(client) == [handle]
    assert handle.completion() == got[5]


def test_parameters_for_every_prompt(tiny: NativeModel) -> None:
    each = [replace(SHORT, max_new_tokens=n, n=n) for n in (1, 2)]
    got = tiny.generate(["hello", "there"], each)
    assert [len(c.tokens) for c in got] == [1, 2, 2]


def test_without_a_seed_every_prompt_differs(tiny: NativeModel) -> None:
    got = tiny.generate(["hello", "hello"], replace(SHORT, seed=None))
    assert got[0].tokens != got[1].tokens
    got = tiny.generate(["hello", "hello"], SHORT)
    assert got[0] == got[1]


def test_no_prompts(tiny: NativeModel) -> None:
    assert tiny.generate([]) == []
    assert tiny.score([]) == []


def test_no_new_tokens(tiny: NativeModel) -> None:
    (got,) = tiny.generate(["hello"], replace(SHORT, max_new_tokens=0))
    assert (got.tokens, got.text, got.finish_reason) == ([], "", "length")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("hello", "prompts: expected a list of prompts, got str"),
        (CHAT, "prompts: expected a list of texts or chats, got one chat"),
        ([1, 2], "prompts: expected a list of token lists, got one"),
        (["hi", []], "prompt 1: .*at least one token"),
        (["hi", ""], "prompt 1: expected text, got none"),
        (["hi", [1, 111]], r"prompt 1: .*111 at index 1"),
        (["hi", [1, -1]], "prompt 1: .*index 1: id -1 names row 0 .* no adapter"),
        (["hi", [1, "a"]], "prompt 1: .*'a' at index 1"),
        (["hi", [1, 2**40]], "prompt 1: "),
        (["hi", [1.0]], "prompt 1: "),
        (["hi", np.ones(3)], "prompt 1: .*float64"),
        (["hi", 3], "prompt 1: expected token ids, a chat or a text"),
        (["hi", [5] * 256], "prompt 1: .*context of 256, got 256"),
        (["hi", [{"role": "user"}]], "prompt 1: message 0: "),
        (["hi", "a\udfff"], "prompt 1: .*lone surrogate"),
    ],
)
def test_bad_prompts(tiny: NativeModel, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny.generate(prompts, SHORT)
    assert "\n" not in str(caught.value)
    assert_settles(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature: "),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"top_p": 10**400}, "top_p: expected a number that a float holds"),
        ({"stop": ("\n", "a\ud800")}, r"stop: lone surrogate U\+D800 at character 1"),
        ({"top_k": -1}, "top_k: "),
        ({"top_k": 1.5}, "top_k: expected an integer"),
        ({"top_k": 2**40}, "top_k: expected an integer"),
        ({"top_p": 0.0}, "top_p: "),
        ({"min_p": 1.5}, "min_p: "),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected 0.01 to 100 "),
        ({"presence_penalty": float("nan")}, "presence_penalty: "),
        ({"frequency_penalty": "2"}, "frequency_penalty: expected a number, got '2'"),
        ({"max_new_tokens": -1}, "max_new_tokens: "),
        ({"min_new_tokens": 13}, "min_new_tokens: "),
        ({"n": 0}, "n: expected an integer of 1 or more, got 0"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"seed": 2**64}, "seed: expected an integer"),
        ({"stop": "the"}, "stop: expected a tuple of strings, got 'the'"),
        ({"stop": ("",)}, "stop: "),
        ({"stop_token_ids": (111,)}, "stop_token_ids: "),
        ({"ignore_eos": None}, "ignore_eos: "),
        ({"deadline_seconds": -1.0}, "deadline_seconds: expected more than 0"),
        ({"deadline_seconds": 0.0}, "deadline_seconds: expected more than 0"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds: "),
    ],
)
def test_bad_parameters(tiny: NativeModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="prompt 0: " + message) as caught:
        tiny.generate(["hello"], replace(SHORT, **change))
    assert "\n" not in str(caught.value)


def test_the_wrong_number_of_parameters(tiny: NativeModel) -> None:
    with pytest.raises(ValueError, match=r"expected one, or 1 \(one per prompt\), got 2"):
        tiny.generate(["hello"], [SHORT, SHORT])


# --- score ---


def test_scores_are_what_was_sampled_to_the_bit(tiny: NativeModel) -> None:
    params = replace(SHORT, temperature=0.7, n=4)
    got = tiny.generate(["hello", "there again"], params)
    scores = tiny.score([c.prompt_tokens + c.tokens for c in got], temperature=0.7)
    for completion, score in zip(got, scores, strict=True):
        assert score.dtype == np.float32
        assert len(score) == len(completion.prompt_tokens) + len(completion.tokens) - 1
        assert score[len(completion.prompt_tokens) - 1 :].tolist() == completion.logprobs


def test_scores_of_short_sequences(tiny: NativeModel) -> None:
    scores = tiny.score([[5], [5, 6], [7]])
    assert [len(score) for score in scores] == [0, 1, 0]
    assert scores[1].tolist() == tiny.score([[5, 6, 9]])[0][:1].tolist()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([[1], []], "sequence 1: expected at least one token"), ([[1, "a"]], "sequence 0: .*'a'")],
)
def test_bad_sequences(tiny: NativeModel, sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.score(sequences)
    with pytest.raises(ValueError, match="111"):
        tiny.score([[1, 111]])
    with pytest.raises(ValueError, match="temperature"):
        tiny.score([[1, 2]], temperature=-1.0)


# --- adapters ---


def test_an_adapter_changes_the_model_and_scores_alike(tiny: NativeModel) -> None:
    weights = lora(tiny)
    base, adapted = (
        tiny.generate(["hello"], SHORT),
        tiny.generate(["hello"], SHORT, adapter=weights),
    )
    assert base[0].logprobs != adapted[0].logprobs
    (score,) = tiny.score([adapted[0].prompt_tokens + adapted[0].tokens], adapter=weights)
    assert score[len(adapted[0].prompt_tokens) - 1 :].tolist() == adapted[0].logprobs


def test_an_adapter_that_adds_nothing(tiny: NativeModel) -> None:
    weights = lora(tiny)
    nothing = replace(
        weights, matrices={n: (a, np.zeros_like(b)) for n, (a, b) in weights.matrices.items()}
    )
    assert tiny.generate(["hello"], SHORT, adapter=nothing) == tiny.generate(["hello"], SHORT)


def test_an_adapter_from_a_folder(tiny: NativeModel, tmp_path: Path) -> None:
    first, second = lora(tiny, 1), lora(tiny, 2)
    save_peft(tmp_path, first)
    expected = [tiny.generate(["hello"], SHORT, adapter=w) for w in (first, second)]
    assert tiny.generate(["hello"], SHORT, adapter=tmp_path) == expected[0]
    assert tiny.make_adapter(tmp_path) is tiny.make_adapter(str(tmp_path))
    time.sleep(0.02)  # the time of change must differ
    save_peft(tmp_path, second)
    assert tiny.generate(["hello"], SHORT, adapter=tmp_path) == expected[1]


def test_adapters_are_made_once_and_let_go(tiny: NativeModel) -> None:
    weights = lora(tiny)
    made = tiny.make_adapter(weights)
    assert tiny.make_adapter(weights) is made and tiny.make_adapter(made) is made
    assert tiny.make_adapter(lora(tiny)) is not made
    kept = len(tiny._adapters)
    del weights
    gc.collect()
    assert len(tiny._adapters) < kept


def test_bad_adapters(tiny: NativeModel, tmp_path: Path) -> None:
    weights = lora(tiny, modules=1)
    ((name, (a, b)),) = weights.matrices.items()
    with pytest.raises(ValueError, match=r"model\.layers\.9\.mlp\.up_proj"):
        tiny.make_adapter(replace(weights, matrices={"model.layers.9.mlp.up_proj": (a, b)}))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        tiny.make_adapter(replace(weights, matrices={name: (a[:, 1:], b)}))
    with pytest.raises(
        ValueError, match="adapter: expected LoraWeights, a SoftPrompt, a PEFT folder or None"
    ):
        tiny.make_adapter(3)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        tiny.generate(["hello"], SHORT, adapter=tmp_path)
