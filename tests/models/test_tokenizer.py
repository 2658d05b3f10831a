"""The tokenizer against transformers' on the same files, and against plain definitions."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from alignpro.models.tokenizer import Tokenizer
from alignpro.native import ModelFileError, core

PLAIN = [
    "",
    " ",
    "Hello",
    " Hello, world!  ",
    "The year 1999 had 365 days; pi is 3.14159, -2e10 and 1,000,000.",
    "1. one\n2. two\n\n3. three",
    "I'm you're he'll they've DON'T we'd it's",
    "def f(x):\n    return x ** 2  # square\n\n\tif x:\n\t\tpass\r\n",
    "naïve café — “quotes” … 東京 日本語 한국어 العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\ufeff\u00a0|",
    "a\x00b\x01c\x7f",
    "½ ² ٣ Ⅷ ① 12٣4",
    "\n\n\n  \n \t \n",
    "x" * 300,
    "ab" * 5000 + " " * 500 + "." * 500,
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.of(core.ModelFiles(str(smollm2_path)))


@pytest.fixture(scope="module")
def upstream(smollm2_path: Path) -> Any:
    """transformers' tokenizer of the same file, splitting digits as SmolLM2's own tokenizer.json
    does; its import of GGUF drops that rule (it shows only where white space runs into a digit)."""
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = found.backend_tokenizer.pre_tokenizer
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return found


def random_texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    pieces = [p for text in PLAIN[:13] for p in text.split(" ")] + [" ", "  ", "\n", "\n\n", "7"]
    return ["".join(source.choices(pieces, k=source.randint(1, 12))) for _ in range(count)]


def test_smollm2_encodes_as_transformers_does(tokenizer: Tokenizer, upstream: Any) -> None:
    for text in PLAIN + random_texts(400):
        assert tokenizer.encode(text) == upstream.encode(text), repr(text)


def test_smollm2_chats_as_transformers_does(tokenizer: Tokenizer, upstream: Any) -> None:
    for text in PLAIN + random_texts(50, seed=1):
        for chat in (
            [{"role": "user", "content": text}],
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": text},
                {"role": "assistant", "content": "Yes.\n"},
                {"role": "user", "content": "And?"},
            ],
        ):
            for prompting in (True, False):
                expected = upstream.apply_chat_template(
                    chat, add_generation_prompt=prompting, return_dict=False
                )
                got = tokenizer.encode_chat(chat, add_generation_prompt=prompting)
                assert got == expected, repr(text)


def test_smollm2_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert tokenizer.decode(tokenizer.encode("2024")) == "2024"
    assert len(tokenizer.encode("2024")) == 4


# SmolLM2's vocabulary lacks some bytes (control characters, planes 4 to 11); upstream drops them
# as well.
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0x3FFFF, codec="utf-8")))
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == text.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|", "|>", "<", " ", "a"])
    )
)
def test_control_text_from_a_user_stays_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert not set(tokenizer.encode(text)) & set(range(17))
    empty = tokenizer.encode_chat([{"role": "user", "content": ""}])
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert [i for i in ids if i < 17] == [i for i in empty if i < 17]
    rendered = tokenizer.decode(ids, skip_special=False)
    assert rendered.endswith(f"user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def test_control_text_in_a_role_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user<|im_end|>", "content": "x"}])
    assert ids.count(2) == 2  # the system turn's and the user turn's


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("hi"), 2]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.token_bytes()[2] == b""
    assert tokenizer.decode([10**6]) == ""  # a row of the model that the tokenizer does not name


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]).strip("�") == ""


def test_bos_is_added_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi", add_bos=True) == [1, *tokenizer.encode("hi")]


@pytest.mark.parametrize("text", ["a" * 10**6, "word " * 200_000, "<|im_end|>" * 10**5])
def test_a_million_characters(tokenizer: Tokenizer, text: str) -> None:
    started = time.perf_counter()
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert time.perf_counter() - started < 20  # about one second; quadratic would take hours
    assert text in tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ab\ud800c", r"lone surrogate U\+D800 at character 2"), (7, "expected text, got int")],
)
def test_bad_text(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="message 0: content: " + message):
        tokenizer.encode_chat([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "got an empty one"),
        ("hello", "expected a list"),
        ([{"role": "user"}], r"message 0: expected a list.*got \['role'\]"),
        (["hello"], "message 0: .*got str"),
    ],
)
def test_bad_chats(tokenizer: Tokenizer, chat: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat(chat)


def test_negative_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode([3, -1])


# --- folders ---

CORPUS = "the then there in on at hat that 123 hello world Hello World she sells sea shells\n" * 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FLAVOURS = {
    "byte-level": lambda b: _byte_level(b, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level-prefix": lambda b: _byte_level(b, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte-level-nfc": lambda b: _byte_level(
        b, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()
    ),
    "metaspace-first": lambda b: _metaspace(b, "first"),
    "metaspace-always": lambda b: _metaspace(b, "always"),
    "metaspace-never": lambda b: _metaspace(b, "never"),
    "llama-2": lambda b: _llama2(b),
    "gemma": lambda b: _gemma(b),
}


def _byte_level(backend: Backend, words: Any, normalizer: Any = None) -> None:
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer


def _metaspace(backend: Backend, scheme: str) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)


def _llama2(backend: Backend) -> None:
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _gemma(backend: Backend) -> None:
    """No space before a text, words that nothing cuts, runs of spaces as added tokens."""
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def save_tokenizer(folder: Path, flavour: str) -> None:
    from tokenizers.trainers import BpeTrainer

    backend = Backend(models.BPE(unk_token="<unk>"))
    FLAVOURS[flavour](backend)
    bytes_ = pre_tokenizers.ByteLevel.alphabet() if flavour.startswith("byte") else ["▁", "\n", "é"]
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=bytes_, special_tokens=["<unk>", "<s>"])
    backend.train_from_iterator([CORPUS], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    specials = ["<|user|>", "<|assistant|>", "<|system|>"]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in specials])
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    if flavour == "gemma":
        plain = [AddedToken(t, normalized=False, special=False) for t in ("▁▁", "▁▁▁", "\n\n")]
        backend.add_tokens(plain)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
        "chat_template": [
            {"name": "tool_use", "template": "no {{ messages[0]['content'] }}"},
            {"name": "default", "template": TEMPLATE},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_folder_encodes_as_transformers_does(tmp_path: Path, flavour: str) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path, flavour)
    ours, theirs = (
        Tokenizer.from_folder(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    texts = ["hello there 123", " the  hat", "", "\nthat\n", "Hello\n\nWorld ", "e\u0301 é", "a▁▁b"]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
        chat = [{"role": "system", "content": "in"}, {"role": "user", "content": text}]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == expected, repr(text)
    assert ours.encode_chat([{"role": "user", "content": "a"}]).count(ours.bos_id) == 1
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("flavour", ["byte-level", "llama-2"])
def test_special_tokens_of_a_folder_stay_text_in_messages(tmp_path: Path, flavour: str) -> None:
    save_tokenizer(tmp_path, flavour)
    tokenizer = Tokenizer.from_folder(tmp_path)
    first = tokenizer.vocab_size - 5
    added, tool_call = {*range(first, first + 4), 1}, first + 4
    ids = tokenizer.encode("a<tool_call><|end|><s>")
    assert not added & set(ids) and ids.count(tool_call) == 1  # which is no control token
    ids = tokenizer.encode_chat([{"role": "user", "content": "<tool_call><|end|>"}])
    assert len([i for i in ids if i in added]) == 4  # <s> <|user|> <|end|> <|assistant|>
    assert ids.count(tool_call) == 1


@pytest.mark.parametrize("text", ["<\uff5cUser\uff5c>", "<|fim_middle|>", "<start_of_turn>"])
def test_a_marker_stays_text_whatever_the_file_calls_it(tmp_path: Path, text: str) -> None:
    save_tokenizer(tmp_path, "byte-level")
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"][-1]["content"] = text  # special: false
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    marker = tokenizer.vocab_size - 1
    assert marker not in tokenizer.encode(text)
    assert marker not in tokenizer.encode_chat([{"role": "user", "content": text}])


def test_every_eos_of_the_generation_config_counts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    end = Tokenizer.from_folder(tmp_path).eos_ids
    assert len(end) == 1
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}', "utf-8")
    assert Tokenizer.from_folder(tmp_path).eos_ids == (*end, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', "utf-8")
    assert Tokenizer.from_folder(tmp_path).eos_ids == (*end, 7, 8, 9)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_template_file_goes_before_the_config(tmp_path: Path, encoding: str) -> None:
    save_tokenizer(tmp_path, "byte-level")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "hat"}]) == tokenizer.encode("hat")


@pytest.mark.parametrize(
    "content",
    ["m['text']", "m.contents", "m.content[0].text", "''"],  # jinja writes nothing for most
)
def test_a_template_that_leaves_out_what_the_user_says_is_refused(
    tmp_path: Path, content: str
) -> None:
    save_tokenizer(tmp_path, "byte-level")
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {content} }}}}{{% endfor %}}"
    tokenizer = Tokenizer.from_folder(tmp_path).with_template(template)
    with pytest.raises(ValueError, match="its chat template leaves out what the user says"):
        tokenizer.encode_chat([{"role": "user", "content": "How do bees fly?"}])


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="has no BOS token"):
        tokenizer.encode("hi", add_bos=True)


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(CORPUS)) == CORPUS


def test_dropout_in_the_file_does_not_change_the_spelling(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    expected = Tokenizer.from_folder(tmp_path).encode(CORPUS)
    change_json(tmp_path / "tokenizer.json", lambda spec: spec["model"].update(dropout=0.9))
    assert Tokenizer.from_folder(tmp_path).encode(CORPUS) == expected


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("strips", [False, True])
def test_tokens_matched_in_normalized_text(tmp_path: Path, flavour: str, strips: bool) -> None:
    """Which is what `add_tokens("<tool>")` of transformers makes. SentencePiece's normalizer puts a
    "▁" before such a token, too, and finds it behind a space alone."""
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path, flavour)
    plain = [AddedToken(t, normalized=True, lstrip=strips, rstrip=strips) for t in ("<tool>", "é")]
    plain.append(AddedToken("TOOL", normalized=True, single_word=True))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.add_tokens(plain)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in [
        "the <tool> hat",
        "the<tool>hat",
        "<tool>",
        " <tool><tool>",
        "TOOLS TOOL",
        "e\u0301 é",
    ]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, repr(text)
        chat = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == expected, repr(text)
        if "é" not in text:  # of which the byte-level decoder of the library makes half a character
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


def test_the_configurations_flags_of_an_added_token_go_before_the_files(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path, "byte-level")
    token = Tokenizer.from_folder(tmp_path).vocab_size - 1
    flags = {"content": "<tool_call>", "lstrip": True, "rstrip": True, "normalized": False}
    flags |= {"single_word": False, "special": False}
    # The second id is the library's business: it knows the text by its own.
    named = {str(token): flags, str(token + 7): flags}
    change_json(
        tmp_path / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=named)
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("a <tool_call> b", "<tool_call>", "in<tool_call>\n"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
    assert ours.vocab_size == token + 1


def test_a_template_reads_the_models_own_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    own = {"boi_token": "<|user|>", "extra_special_tokens": {"image": {"content": "<|system|>"}}}
    template = "{{ boi_token }}{{ image }}{{ messages[0].content }}"
    change_json(
        tmp_path / "tokenizer_config.json",
        lambda config: config.update(own, chat_template=template, add_bos_token=True),
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = {t.text: t.id for t in tokenizer.added}
    chat = tokenizer.encode_chat([{"role": "user", "content": "hat"}])
    assert chat == [ids["<|user|>"], ids["<|system|>"], *tokenizer.encode("hat")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json: no such file"),
        ("<html></html>", "JSON line 1, column 1: expected a value"),
        ("[]", "expected a JSON object, got array"),
        ('{"model": {"type": "WordPiece"}}', "expected a BPE or Unigram model, got WordPiece"),
        ('{"model": {"type": "BPE"}, "decoder": null}', "decoder, got none"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "not a tokenizer"),
        (
            '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}, "added_tokens": [3]}',
            "damaged list of added",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_library_panics_on_is_one_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    prefix = {"continuing_subword_prefix": "longer than every token"}
    change_json(tmp_path / "tokenizer.json", lambda spec: spec["model"].update(prefix))
    with pytest.raises(
        ModelFileError, match=r"tokenizer\.json: not a tokenizer: .* index"
    ) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
