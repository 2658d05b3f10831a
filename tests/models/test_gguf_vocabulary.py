"""Tokenizers of GGUF files: what the files of many converters say, and what they leave out."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from alignpro.models.tokenizer import Tokenizer
from alignpro.native import ModelFileError, core
from real_vocabularies import real_vocabulary, texts_and_ids

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "Ġ 12", "' S", "T 'S", ". Ċ", "h e", "Ġ t", "Ġt he"]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["ab 12345", "IT'S", "12 34", "end.\n\nNew", "a\n\n  b", "HelloWorld"]


def metadata(pre: str | None = "qwen2", plain: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    """A byte-level vocabulary with three control tokens, then ``plain`` added ones."""
    tokens = [*ALPHABET, *(m.replace(" ", "") for m in MERGES), *MARKS, *plain]
    made = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token in MARKS else 4 if token in plain else 1 for token in tokens
        ],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }
    if pre is not None:
        made["tokenizer.ggml.pre"] = pre
    return made | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def ids(given: dict[str, Any]) -> list[list[int]]:
    tokenizer = Tokenizer.from_gguf(given)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("qwen2", ["deepseek-r1-qwen", "kormo", "megrez"]),
        ("llama-bpe", ["llama3", "llama-v3", "falcon3", "pixtral"]),
        ("gpt-2", ["phi-2", "gigachat", "exaone4"]),
        ("dbrx", ["smaug-bpe"]),
        ("gpt-4o", ["llama4"]),
    ],
)
def test_names_of_one_rule(rule: str, names: list[str]) -> None:
    for name in names:
        assert ids(metadata(name)) == ids(metadata(rule)), name


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "ab 123  c", ["ab", " 123", " ", " c"]),
        ("smollm", "ab 12  3", ["ab", " ", "1", "2", "  ", "3"]),
        ("llama-bpe", "ab 12345\n\nIT'S", ["ab", " ", "123", "45", "\n\n", "IT", "'S"]),
        ("qwen2", "ab 123\n c'll", ["ab", " ", "1", "2", "3", "\n", " c", "'ll"]),
        ("tekken", "aBcD 12 IT's/", ["a", "Bc", "D", " ", "1", "2", " IT", "'s", "/"]),
        ("gpt-4o", "aBcD 1234 IT's/", ["a", "Bc", "D", " ", "123", "4", " IT's", "/"]),
    ],
)
def test_words_by_pre_tokenizer(pre: str, text: str, words: list[str]) -> None:
    """Every pair merges here, so tokens are exactly the words that merging may not cross."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(p for p, _ in alphabet.pre_tokenize_str(word)) for word in [*words, text]]
    tokens = sorted({char for word in spelled for char in word})
    merges = []
    whole = spelled[-1]
    for begin in range(len(whole)):
        for end in range(begin + 2, len(whole) + 1):
            if whole[begin:end] not in tokens:
                tokens.append(whole[begin:end])
            merges.append(f"{whole[begin : end - 1]} {whole[end - 1]}")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


def test_a_rule_that_is_not_known_is_refused() -> None:
    with pytest.raises(
        ModelFileError, match=r"words cut as 'olmo' are not supported.*tokenizer\.j"
    ):
        Tokenizer.from_gguf(metadata("olmo"))


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_without_a_rule_is_read_by_its_architecture(
    pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for architecture in ("qwen2", "qwen3"):
        given = metadata(pre) | {"general.architecture": architecture}
        assert ids(given) == ids(metadata("qwen2"))
    assert "taken as qwen2" in caplog.text
    given = metadata(pre) | {"general.architecture": "llama"}
    assert ids(given) == ids(metadata("gpt-2"))  # one of many; Llama 3 by its size
    assert "taken as gpt-2" in caplog.text
    more = [f"<|reserved_{i}|>" for i in range(128_256 - len(given["tokenizer.ggml.tokens"]))]
    given["tokenizer.ggml.tokens"] = given["tokenizer.ggml.tokens"] + more
    given["tokenizer.ggml.token_type"] = given["tokenizer.ggml.token_type"] + [3] * len(more)
    assert ids(given) == ids(metadata("llama-bpe"))


def test_a_file_with_a_rule_is_read_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    ids(metadata("llama-bpe"))
    assert not caplog.records


@pytest.mark.parametrize("key", ["padding", "unknown", "bos", "eos"])
@pytest.mark.parametrize("value", [2**32 - 1, "the number of tokens"])
def test_an_id_that_cannot_be_is_none(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    right = metadata()
    value = len(right["tokenizer.ggml.tokens"]) if isinstance(value, str) else value
    tokenizer = Tokenizer.from_gguf(metadata(**{f"{key}_token_id": value}))
    assert [tokenizer.encode(text) for text in TEXTS] == ids(right)
    assert f"{key}_token_id is {value}" in caplog.text
    assert tokenizer.bos_id is None and tokenizer.eos_ids  # ends are known by their text, too


def test_whole_scores() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "▁h"]
    given = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
        "tokenizer.ggml.scores": [0] * 260 + [-1, -2],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert Tokenizer.from_gguf(given).encode("h") == [tokens.index("▁h")]
    given["tokenizer.ggml.scores"] = [True] * len(tokens)
    with pytest.raises(ModelFileError, match="scores: expected a list of float"):
        Tokenizer.from_gguf(given)


def scored(scores: list[float], types: list[int], pieces: list[str]) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + types,
            "tokenizer.ggml.scores": [0.0] * 259 + scores,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": False,
        }
    )


def test_unused_pieces_are_merged_into_as_llama_cpp_does() -> None:
    pieces = ["a", "b", "c", "ab", "abc"]
    scores = [-float(i) for i in range(5)]
    assert scored(scores, [1, 1, 1, 5, 1], pieces).encode("abcab") == [263, 262]


def test_scores_that_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """As an early converter wrote them for folders with tokenizer.json, whose ids are in the order
    of merges."""
    pieces = ["a", "b", "c", "bc", "ab"]
    assert scored([-1000.0] * 5, [1] * 5, pieces).encode("abc") == [259, 262]
    assert "scores are all the same" in caplog.text
    caplog.clear()
    assert scored([-float(i) for i in range(5)], [1] * 5, pieces).encode("abc") == [259, 262]
    assert not caplog.records


# --- added tokens that are not special ---


def test_an_added_word_that_merges_make() -> None:
    given = metadata()
    he = given["tokenizer.ggml.tokens"].index("he")
    the = given["tokenizer.ggml.tokens"].index("Ġthe")
    given["tokenizer.ggml.token_type"][he] = 4
    tokenizer = Tokenizer.from_gguf(given)
    assert tokenizer.encode("he") == [he]
    t = ALPHABET.index("t")
    assert tokenizer.encode("the") == [t, he]
    given["tokenizer.ggml.token_type"][he], given["tokenizer.ggml.token_type"][the] = 1, 4
    assert Tokenizer.from_gguf(given).encode("he the") == [he, the]


def test_plain_added_tokens_are_matched_in_text_and_special_ones_are_not() -> None:
    """As everyone's tokenizers do: the model was trained with them. A text with "<|im_end|>" in it
    has none of its own."""
    plain = ("    ", "<think>")
    given = metadata(plain=plain, eos_token_id=ALPHABET.index("a"))
    spaces, think = (given["tokenizer.ggml.tokens"].index(text) for text in plain)
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.from_gguf(given | {"tokenizer.chat_template": template})
    a, b = (ALPHABET.index(char) for char in "ab")
    assert tokenizer.encode("    a<think>b") == [spaces, a, think, b]
    assert tokenizer.encode("     a")[0] == spaces  # and a fifth
    assert tokenizer.decode([think, a]) == "<think>a"
    start, end = (
        given["tokenizer.ggml.tokens"].index(f"<|im_{side}|>") for side in ("start", "end")
    )
    text = "a<think>b<|im_end|>"
    assert not {start, end} & set(tokenizer.encode(text))
    chat = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert chat == [start, *tokenizer.encode(text), end]


# --- Phi-3 ---


def phi3(**changes: Any) -> dict[str, Any]:
    pieces = ["▁", "h", "i", "hi", "▁hi"]
    marks = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *marks]
    return {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 4] + [6] * 256 + [1] * len(pieces) + [3] * len(marks),
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0] + [0.0] * len(marks),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ '<|user|>\n' + "
        "m.content + '<|end|>\n<|assistant|>\n' }}{% endfor %}",
    } | changes


@pytest.mark.parametrize("name", [{}, {"general.architecture": "x", "general.name": "Phi-3 mini"}])
def test_phi3s_markers_swallow_the_white_space_behind_them(name: dict[str, Any]) -> None:
    given = phi3(**name)
    expected = ["<s>", "<|user|>", "▁hi", "<|end|>", "<|assistant|>"]
    got = Tokenizer.from_gguf(given).encode_chat([{"role": "user", "content": "hi"}])
    assert [given["tokenizer.ggml.tokens"][i] for i in got] == expected


def test_markers_of_others_keep_it() -> None:
    given = phi3(**{"general.architecture": "llama"})
    got = Tokenizer.from_gguf(given).encode_chat([{"role": "user", "content": "hi"}])
    assert given["tokenizer.ggml.tokens"].index("<0x0A>") in got


# --- real vocabularies: llama.cpp's own texts ---


@pytest.mark.parametrize("name", ["gpt-2", "phi-3", "qwen2", "llama-bpe", "llama-spm"])
@pytest.mark.parametrize("with_pre", [True, False])
def test_ids_of_llama_cpps_texts(
    name: str, with_pre: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    file = real_vocabulary(f"vocab/ggml-vocab-{name}.gguf")
    given = core.ModelFiles(str(file)).metadata()
    assert given is not None
    if not with_pre:
        del given["tokenizer.ggml.pre"]
    tokenizer = Tokenizer.from_gguf(given)
    for text, expected in texts_and_ids(name):
        assert tokenizer.encode(text) == expected, repr(text)


@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n", '<tool_call>\n{"a": 1}\n</tool_call>'])
def test_qwen3s_folder_encodes_its_words_as_transformers_does(text: str) -> None:
    folder = real_vocabulary("tokenizers/qwen3")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.from_folder(folder).encode(text) == theirs.encode(text)


# --- GGUF with SentencePiece's BPE ---


def sentencepiece_metadata(add_space_prefix: bool = True) -> dict[str, Any]:
    """A vocabulary as llama.cpp's converter writes it: control tokens, bytes, scored pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    pieces = [
        "▁t", "he", "▁the", "in", "▁▁", "er", "▁a", "re", "▁there", "ing", "▁▁▁▁", "th", "</", "s>",
    ]  # fmt: skip
    alphabet = sorted({char for piece in pieces for char in piece} | set("abcdefghijklmno é"))
    for rank, piece in enumerate([*pieces, *(c for c in alphabet if c != " ")]):
        tokens.append(piece)
        types.append(1)
        scores.append(-float(rank))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}"
        " [/INST]{% endfor %}",
    }


def plain_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE as defined: join the neighbours that make the best piece, the leftmost
    first, until none do; what is left and unknown is spelled in bytes."""
    rows = zip(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.token_type"],
        metadata["tokenizer.ggml.scores"],
        strict=True,
    )
    known = {token: (score, i) for i, (token, kind, score) in enumerate(rows) if kind == 1}
    prefix = "▁" if metadata["tokenizer.ggml.add_space_prefix"] and text else ""
    parts = list(prefix + text.replace(" ", "▁"))
    while True:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        joined = [(known[pair][0], -i) for i, pair in enumerate(pairs) if pair in known]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [known[part][1]] if part in known else [3 + byte for byte in part.encode("utf-8")]
    return ids


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_from_scores(add_space_prefix: bool) -> None:
    metadata = sentencepiece_metadata(add_space_prefix)
    tokenizer = Tokenizer.from_gguf(metadata)
    source = random.Random(5)
    pieces = ["the", "there", " ", "    ", "ing", "in", "Z", "é", "日", "th", "e", "</s>", "\n"]
    texts = ["".join(source.choices(pieces, k=source.randint(0, 9))) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == plain_sentencepiece(metadata, text), repr(text)
        assert tokenizer.decode(ids) == text
    assert 2 not in tokenizer.encode("</s>")


def test_sentencepiece_chat_has_one_bos() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode_chat([{"role": "user", "content": "the<s></s>"}])
    assert ids == [1, *plain_sentencepiece(metadata, "[INST] the<s></s> [/INST]")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "expected gpt2 or llama, got 't5'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model: expected str"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens and"),
        ({"tokenizer.ggml.scores": [0.5]}, "1 scores"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens: expected a list of str"),
        ({"tokenizer.ggml.eos_token_id": True}, "expected int, got bool"),
        ({"tokenizer.ggml.model": "gpt2"}, "no tokenizer.ggml.merges"),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "quux"},
            "tokenizer.ggml.pre: words cut as 'quux' are not supported; expected one of",
        ),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["ab"]},
            "expected two tokens, got 'ab'",
        ),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x yz"]},
            "vocabulary and merges do not fit: 'x', 'yz' or what they make is no token of text",
        ),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b", "ab c"]},
            "vocabulary and merges do not fit: 'a', 'b' or what they make",
        ),
    ],
)
def test_damaged_gguf_metadata(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_gguf(sentencepiece_metadata() | change, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)
