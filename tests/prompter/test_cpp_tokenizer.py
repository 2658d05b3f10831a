"""The C++ tokenizer gives the ids that Python's gives, whatever the text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trained
from tokenizers import models, pre_tokenizers, trainers

from alignpro.models.tokenizer import Tokenizer
from alignpro.native import ModelFileError, core
from testing_extension import load_testing

ROOT = Path(__file__).resolve().parents[2]
RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx")
CONTROL, PLAIN = ["<|im_start|>", "<|im_end|>", "</s>"], ["<think>", "   ", "ab c"]
TEMPLATE = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>\n"
# What the expressions tell apart, and what only looks like it.
COMPOSED = "e\u0327\u0301\u1100\u1161\u11a8\uac00\u212b\u0344\u0958"
MIXED = "aZ \xe9'\u017f\n\r\t 1\u0663\xbd\u3000\xa0\x85\x1c.!<_\u0301\u200b\u4e2d\U0001f642"
PIECES = [*CONTROL, *PLAIN, "im_end|>", "'ll", "'Ve", " 12345 "]
TELLING = st.sampled_from([*MIXED, *COMPOSED, *"sStTmMdDlLvVeErR", *PIECES])
TEXT = st.lists(TELLING | st.characters(exclude_categories=["Cs"]), max_size=24).map("".join)
SHIPPED = ROOT / "python/alignpro/data/everyday_prompts.jsonl"
EVERYDAY = [json.loads(line)["prompt"] for line in SHIPPED.read_text("utf-8").splitlines()]


def write_vocabulary(path: Path, rule: str, kind: str = "gpt2") -> Path:
    """A GGUF file with a tokenizer alone, trained on the shipped prompts."""
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(EVERYDAY + ["12 345 678"] * 9, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*model["vocab"], "Ġhom", *CONTROL, *PLAIN]
    types = [3 if t in CONTROL[:2] else 4 if t in PLAIN else 1 for t in tokens]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    writer.add_eos_token_id(tokens.index("</s>"))  # typed as an ordinary token
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=RULES)
def both(request, tmp_path_factory):
    path = write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", request.param)
    return load_testing().Tokenizer(str(path)), Tokenizer.of(core.ModelFiles(str(path)))


def check(both, text: str) -> None:
    ours, python = both
    ids = python.encode(text)
    assert ours.encode("", text, "") == ids
    assert ours.join_bytes(ids) == python.join_bytes(ids)
    before, after, strips = python.around_turn()
    chat = [{"role": "user", "content": text}]
    assert not strips and ours.encode(before, text, after) == python.encode_chat(chat)


@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_any_text(both, text):
    check(both, text)


def test_shipped_prompts_and_long_words(both):
    for text in [*EVERYDAY, "a" * 5000, " " * 999 + "x", "<|im_end|>" * 20, "in" * 3000]:
        check(both, text)


def test_the_default_model(smollm2_path):
    both = (
        load_testing().Tokenizer(str(smollm2_path)),
        Tokenizer.of(core.ModelFiles(str(smollm2_path))),
    )
    for text in [*EVERYDAY, "x<|im_end|>", "  12 caf\u00e9s it's \n\n 3", "a" * 999]:
        check(both, text)


def test_what_is_not_known_is_refused_by_name(tmp_path):
    made = load_testing().Tokenizer
    with pytest.raises(ModelFileError, match="words cut as tekken are not known here; expected gp"):
        made(str(write_vocabulary(tmp_path / "a.gguf", "tekken")))
    with pytest.raises(ModelFileError, match=r"expected gpt2 \(byte-level BPE\), got llama"):
        made(str(write_vocabulary(tmp_path / "b.gguf", "gpt-2", "llama")))
    with pytest.raises(ModelFileError, match="expected a GGUF file"):
        made(str(tmp_path))


def test_the_tables_are_those_of_the_tokenizers_package():
    folder = ROOT / "src" / "alignpro" / "prompter"
    spec = importlib.util.spec_from_file_location("g", folder / "generate_unicode_tables.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.header() == (folder / "unicode_tables.h").read_text("utf-8")
