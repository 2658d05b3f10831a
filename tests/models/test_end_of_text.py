"""One list of the ids that end a text: engine, tokenizer and warm start agree on it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from alignpro.models.native_model import load_model
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import core
from alignpro.train.sft import end_of_turn
from real_vocabularies import real_vocabulary

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}]


def edit(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    value = json.loads(file.read_text("utf-8")) if file.exists() else {}
    value |= changes
    file.write_text(json.dumps(value), "utf-8")


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Path:
    """A model whose config.json names the end 5; <|user|> and <|assistant|> are 3 and 4."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir("qwen2"), copy)
    (copy / "generation_config.json").unlink(missing_ok=True)
    edit(copy, "tokenizer_config.json", eos_token="<unk>")
    edit(copy, "config.json", eos_token_id=5)
    return copy


def ends(folder: Path) -> tuple[int, ...]:
    model = load_model(folder, threads=1)
    assert tuple(model.config["eos_ids"]) == model.tokenizer.eos_ids
    return model.tokenizer.eos_ids


def test_every_file_of_a_folder_adds_its_ends(folder: Path) -> None:
    assert ends(folder) == (0, 5, 2)  # </s> is a control token of the tokenizer's
    edit(folder, "tokenizer_config.json", eos_token={"content": "<|user|>"})
    assert ends(folder) == (3, 5, 2)
    edit(folder, "generation_config.json", eos_token_id=[7, 8])
    assert ends(folder) == (3, 7, 8, 5, 2)
    edit(folder, "special_tokens_map.json", eos_token="<|assistant|>")
    assert ends(folder) == (3, 4, 7, 8, 5, 2)


def test_ends_known_by_text_count_whatever_their_type(folder: Path) -> None:
    added = {
        "105": {"content": "<|im_end|>", "special": False},
        "106": {"content": "<|IM_END|>", "special": True},
        "107": {"content": "<|endoftext|>"},
        "4000": {"content": "<|eot_id|>", "special": True},  # beyond the vocabulary
    }
    edit(folder, "tokenizer_config.json", added_tokens_decoder=added, pad_token="<|endoftext|>")
    assert ends(folder) == (0, 5, 2, 105, 107)
    # What ends a text is no part of it.
    assert Tokenizer.from_folder(folder).decode([10, 105]) == Tokenizer.from_folder(folder).decode(
        [10]
    )


def gguf_metadata(types: dict[str, int] | None = None, **keys: int) -> dict[str, Any]:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|IM_END|>"]
    tokens = [*map(chr, range(0x21, 0x7F)), "Ġ", "Ċ", *marks]
    default = dict.fromkeys([*marks[:3], marks[4]], 3)
    kinds = [(default | (types or {})).get(text, 1) for text in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [],
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.ggml.{name}_token_id": value for name, value in keys.items()},
    }


TEXT, START, END, STRIKE = 96, 97, 98, 99


def test_ends_of_gguf_metadata() -> None:
    def of(types: dict[str, int] | None = None, **keys: int) -> tuple[int, ...]:
        return Tokenizer.from_gguf(gguf_metadata(types, **keys)).eos_ids

    assert of() == (TEXT, END)
    assert of(eos=END) == (END, TEXT)
    assert of(eot=7, eom=8) == (7, 8, TEXT, END)
    assert of({"</s>": 3}, eos=END) == (END, TEXT, STRIKE)
    assert of({"</s>": 4}, eos=END) == (END, TEXT)
    assert of({"<|im_end|>": 1}, eos=TEXT) == (TEXT, END)


@pytest.mark.parametrize("kind", [1, 4])
def test_markers_of_a_wrong_type_are_control_tokens(
    kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    right = Tokenizer.from_gguf(gguf_metadata())
    assert caplog.text == ""
    types = {"<|endoftext|>": kind, "<|im_end|>": kind}
    wrong = Tokenizer.from_gguf(gguf_metadata(types), "m.gguf")
    if kind == 1:
        assert "m.gguf: typed as ordinary tokens" in caplog.text
        assert "look like: <|endoftext|>, <|im_end|>\n" in caplog.text
    assert wrong.encode_chat(CHAT) == right.encode_chat(CHAT)
    assert wrong.decode([START, END, TEXT]) == ""
    hostile = wrong.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert hostile.count(END) == 1 and end_of_turn(wrong) == END


def test_a_named_end_of_a_wrong_type_is_no_word() -> None:
    """ "</s>" is a word of the vocabulary, unless the file says that it is an end."""
    word, end = (Tokenizer.from_gguf(gguf_metadata(eos=eos)) for eos in (END, STRIKE))
    assert word.decode([STRIKE]) == "</s>" and end.decode([STRIKE]) == ""
    assert word.eos_ids == (END, TEXT) and end.eos_ids == (STRIKE, TEXT, END)
    letter = Tokenizer.from_gguf(gguf_metadata(eos=5))
    assert letter.eos_ids == (5, TEXT, END) and letter.decode([5]) == "&"


# --- real vocabularies ---


@pytest.mark.parametrize(
    ("name", "texts", "taught"),
    [
        ("vocab/ggml-vocab-gpt-2.gguf", {"<|endoftext|>"}, None),
        ("vocab/ggml-vocab-phi-3.gguf", {"<|endoftext|>", "<|end|>"}, "<|end|>"),
        # "</s>" is an ordinary word of Qwen's vocabulary
        ("vocab/ggml-vocab-qwen2.gguf", {"<|endoftext|>", "<|im_end|>"}, None),
        ("tokenizers/qwen3", {"<|endoftext|>", "<|im_end|>"}, "<|im_end|>"),
        ("tokenizers/mistral-v1", {"</s>"}, None),
    ],
)
def test_real_vocabularies(name: str, texts: set[str], taught: str | None) -> None:
    tokenizer = Tokenizer.of(core.ModelFiles(str(real_vocabulary(name))))
    spelled = {tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids}
    assert spelled == texts
    if taught is not None and tokenizer.chat_templates:
        assert tokenizer.decode([end_of_turn(tokenizer)], skip_special=False) == taught


# --- each file once ---

_IN_OPEN, _IN_CLOSE = 0x20, 0x10


@contextmanager
def count_opens(folder: Path) -> Iterator[dict[str, int]]:
    """How often each file of a folder is opened meanwhile, by anyone (inotify)."""
    # The closing is watched, too: equal events in a row are told once.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("this system has no inotify")
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(folder), _IN_OPEN | _IN_CLOSE) >= 0
    counts: dict[str, int] = {}
    try:
        yield counts
        data = b""
        with suppress(BlockingIOError):
            data = os.read(watch, 1 << 16)
        while data:
            _, mask, _, size = struct.unpack_from("iIII", data)
            name = data[16 : 16 + size].rstrip(b"\0").decode()
            if name and mask & _IN_OPEN:
                counts[name] = counts.get(name, 0) + 1
            data = data[16 + size :]
    finally:
        os.close(watch)


def test_a_load_opens_each_file_of_a_folder_once(folder: Path) -> None:
    edit(folder, "generation_config.json", eos_token_id=5)
    with count_opens(folder) as opened:
        load_model(folder, threads=1)
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    expected |= {"tokenizer_config.json"}
    assert opened == dict.fromkeys(expected, 1)


def test_a_load_opens_a_gguf_file_once(tmp_path: Path, smollm2_path: Path) -> None:
    file = tmp_path / "model.gguf"
    os.link(smollm2_path, file) if _same_device(smollm2_path, tmp_path) else shutil.copy(
        smollm2_path, file
    )
    with count_opens(tmp_path) as opened:
        load_model(file, threads=1)
    assert opened == {"model.gguf": 1}


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev
