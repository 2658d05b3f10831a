"""The C++ tokenizer gives the ids that Python's gives, whatever the text."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trained
from tokenizers import models, pre_tokenizers, trainers

import alignpro
from alignpro.config import REWRITE, Prompting
from alignpro.models.native_model import load_model
from alignpro.models.pre_tokenizer import named_rule
from alignpro.models.prompter_file import save_prompter
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import ModelFileError, core
from native_runs import lora
from real_vocabularies import real_vocabulary, texts_and_ids
from testing_extension import load_testing

ROOT = Path(__file__).resolve().parents[2]
RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o")
KINDS = [{"rule": rule} for rule in RULES] + [
    {"sentencepiece": True},
    {"sentencepiece": True, "add_space_prefix": False},
    {"sentencepiece": True, "architecture": "phi3"},
]
CONTROL = ["<|im_start|>", "<|im_end|>", "[THINK]", "</s>"]
PLAIN = ["<think>", "   ", "ab c", "▁▁"]
TEMPLATE = "<|im_start|>\n{{ messages[0]['content'] }}<|im_end|>\n"
# What the expressions tell apart, and what only looks like it.
COMPOSED = "e\u0327\u0301\u1100\u1161\u11a8\uac00\u212b\u0344\u0958"
MIXED = "aZ \xe9'\u017f\n\r\t 1\u0663\xbd\u3000\xa0\x85\x1c.!<_\u0301\u200b\u4e2d\U0001f642"
PIECES = [*CONTROL, *PLAIN, "im_end|>", "'ll", "'Ve", " 12345 ", "<unk>", "<0x0A>", "\u01c5B/\n"]
TELLING = st.sampled_from([*MIXED, *COMPOSED, *"sStTmMdDlLvVeErR", *PIECES])
LETTERS = st.sampled_from([*"abAB中\u01c5\u02b0\u0301'/", "'s"])  # of every case, and of none
TEXT = st.lists(TELLING | st.characters(exclude_categories=["Cs"]), max_size=24).map("".join)
SHIPPED = ROOT / "python/alignpro/data/everyday_prompts.jsonl"
EVERYDAY = [json.loads(line)["prompt"] for line in SHIPPED.read_text("utf-8").splitlines()]


def trained_on_the_prompts(words: pre_tokenizers.PreTokenizer, alphabet: list[str]) -> dict:
    trained = Trained(models.BPE())
    trained.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(EVERYDAY + ["12 345 678"] * 9, trainer)
    return json.loads(trained.to_str())["model"]


def add_layer(writer: gguf.GGUFWriter, vocab_size: int, hidden: int) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    draw = np.random.default_rng(0)
    for name in ("token_embd", "output"):
        weight = draw.normal(size=(vocab_size, hidden)) / hidden**0.5
        writer.add_tensor(f"{name}.weight", weight.astype("f4"))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weight = draw.normal(size=(hidden, hidden)) / hidden**0.5
        writer.add_tensor(f"blk.0.{name}.weight", weight.astype("f4"))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, "f4"))


def write_vocabulary(
    path: Path,
    rule: str = "gpt-2",
    *,
    sentencepiece: bool = False,
    kind: str | None = None,
    architecture: str = "llama",
    add_space_prefix: bool = True,
    left_out: str = "",
    scores: list[float] | None = None,
    hidden: int = 0,
) -> Path:
    """A GGUF file with a tokenizer, and a model of one random layer where it is ``hidden`` wide."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_tokenizer_model(kind or ("llama" if sentencepiece else "gpt2"))
    if sentencepiece:
        pieces = [*trained_on_the_prompts(pre_tokenizers.Metaspace(), [])["vocab"], "▁▁▁▁"]
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tokens = ["<unk>", *(token for token in bytes_ if token != left_out), *pieces]
        types = [2] + [6] * (len(tokens) - 1 - len(pieces)) + [1] * len(pieces)
        types[-200::20] = [5] * 10  # unused, by their writer's word
        # Scores are not in the order of the ids, and many are equal.
        ranked = [-float((i * 7 if i % 5 else i) // 400) for i in range(len(pieces))]
        around = [0.0] * (len(tokens) - len(pieces)), [0.0] * len([*CONTROL, *PLAIN])
        writer.add_token_scores(scores or [*around[0], *ranked, *around[1]])
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(add_space_prefix)
    else:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model = trained_on_the_prompts(words, pre_tokenizers.ByteLevel.alphabet())
        tokens = [*model["vocab"], "Ġhom"]
        types = [1] * len(tokens)
        types[-100::20] = [4] * 5  # added words that merges make
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges(merges)
    tokens += [*CONTROL, *PLAIN]
    writer.add_token_list(tokens)
    writer.add_token_types([*types, 3, 3, 3, 1, *(4 for _ in PLAIN)])
    writer.add_eos_token_id(tokens.index("</s>"))  # typed as an ordinary token
    writer.add_chat_template(TEMPLATE)
    if hidden:
        add_layer(writer, len(tokens), hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def both(request, tmp_path_factory):
    path = write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", **request.param)
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


@pytest.mark.parametrize("rule", RULES)
def test_words(rule):
    """Merges hardly ever tell where a word of strange letters ends."""
    split_words, python = load_testing().split_words, named_rule(rule).pre_tokenizer()

    @settings(max_examples=400, deadline=None)
    @given(text=st.lists(TELLING | LETTERS, max_size=16).map("".join))
    def check(text):
        words = [text[begin:end] for _, (begin, end) in python.pre_tokenize_str(text)]
        assert split_words(text, rule) == words

    check()


def test_bytes_of_every_token(both):
    ours, python = both
    expected = python.token_bytes()
    assert [ours.join_bytes([i]) for i in range(len(expected))] == expected
    assert b"[THINK]" in expected and b"<|im_end|>" not in expected


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


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe", "llama-spm", "phi-3"])
def test_ids_of_llama_cpps_texts(name):
    tokenizer = load_testing().Tokenizer(str(real_vocabulary(f"vocab/ggml-vocab-{name}.gguf")))
    for text, ids in texts_and_ids(name):
        assert tokenizer.encode("", text, "") == ids, repr(text)


def test_a_real_sentencepiece_vocabulary(caplog):
    file = str(real_vocabulary("vocab/ggml-vocab-phi-3.gguf"))
    both = load_testing().Tokenizer(file), Tokenizer.of(core.ModelFiles(file))
    lines = [line for path in ROOT.rglob("src/**/*.cc") for line in path.open(encoding="utf-8")]
    for text in [*EVERYDAY, *lines[::9], "x<|end|> \n\ty", "a" * 5000, " " * 999 + "x"]:
        check(both, text)


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_a_prompter_writes_with_it_what_python_writes(tmp_path, add_space_prefix):
    file = tmp_path / "model.gguf"
    write_vocabulary(file, sentencepiece=True, add_space_prefix=add_space_prefix, hidden=32)
    model, params = load_model(file, threads=1), replace(REWRITE, stop=("er", " a"))
    save_prompter(tmp_path, lora(model), model.tokenizer, Prompting(), params)
    ours = load_testing().Prompter(str(file), str(tmp_path))
    texts = set()
    with alignpro.Prompter(model, tmp_path, params=params) as prompter:
        for seed in range(20):
            expected = prompter.rewrite("How do bees fly?", seed=seed)
            got = ours.rewrite([], "How do bees fly?", seed)
            assert got[:2] == (expected.prompt, expected.text)
            assert got[2:] == (expected.applied, expected.reason, expected.tokens)
            texts.add(expected.text)
    assert len(texts) > 15


def test_what_is_not_known_is_refused_by_name(tmp_path):
    def refused(message, **changes):
        with pytest.raises(ModelFileError, match=message):
            load_testing().Tokenizer(str(write_vocabulary(tmp_path / "a.gguf", **changes)))

    refused("words cut as olmo are not known here; expected gpt-2, .* or gpt-4o", rule="olmo")
    refused(r"expected gpt2 \(byte-level BPE\) or llama .*, got t5", kind="t5")
    refused("no <0x41>; expected a token for every byte", sentencepiece=True, left_out="<0x41>")
    refused("tokens and 1 scores; expected as many", sentencepiece=True, scores=[0.5])
    refused("scores: expected a list of numbers", sentencepiece=True, scores=[float("nan")])
    with pytest.raises(ModelFileError, match="expected a GGUF file"):
        load_testing().Tokenizer(str(tmp_path))


def test_the_tables_are_those_of_the_tokenizers_package():
    folder = ROOT / "src" / "alignpro" / "prompter"
    spec = importlib.util.spec_from_file_location("g", folder / "generate_unicode_tables.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.header() == (folder / "unicode_tables.h").read_text("utf-8")
