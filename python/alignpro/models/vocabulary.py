"""What a tokenizer knows, read from a folder with tokenizer.json (of GGUF files: gguf_vocabulary).

Both give a `Vocabulary`: a byte-pair encoder that knows no control tokens, and the control tokens
beside it, so that text can never turn into one by accident (contract 7).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from alignpro import native
from alignpro.models.reasoning import TAGS

if TYPE_CHECKING:
    from alignpro.native import core

# A marker of a chat template.
MARKER = re.compile(r"<([|\uff5c])[^\s<>|\uff5c]+\1>|<(?:start|end)_of_\w+>|\[\|\w+\|\]")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole, outside of the byte-pair encoding."""

    id: int
    text: str
    special: bool = True  # by the file's own word
    lstrip: bool = False  # swallows the white space to its left
    rstrip: bool = False
    single_word: bool = False  # only where no letter, digit or underscore touches it
    normalized: bool = False  # matched by the backend, in the text as its normalizer leaves it

    @property
    def control(self) -> bool:
        """Whether text from outside never becomes it. "<think>" and runs of spaces are ordinary
        text that has a token; DeepSeek's "<\uff5cUser\uff5c>" is not, though its file says so."""
        return self.special or MARKER.fullmatch(self.text) is not None

    @property
    def hidden(self) -> bool:
        """Whether decoded text leaves it out. A tag of reasoning shows what is no answer."""
        return self.special and self.text not in TAGS


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary:
    """What `tokenizer.Tokenizer` works from, and is."""

    backend: tokenizers.Tokenizer  # text at the start of the input; of added, the normalized alone
    continuation: tokenizers.Tokenizer  # text after an added token
    byte_level: bool  # tokens spell bytes in the GPT-2 alphabet; else SentencePiece's "▁"
    strips_space: bool  # decoding drops one leading space, which encoding put there
    added: tuple[AddedToken, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # all that end a text, the tokenizer's own EOS first
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is one
    special_tokens: dict[str, str] = field(default_factory=dict)  # as a template calls them
    source: str = "tokenizer"  # for error messages

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model may have room for more."""
        ids = [*self.backend.get_vocab().values(), *(token.id for token in self.added)]
        return max(ids, default=-1) + 1

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        spelled = _bytes_of_byte_level if self.byte_level else _bytes_of_sentencepiece
        for text, token in self.backend.get_vocab().items():
            pieces[token] = spelled(text)
        for added in self.added:
            text = added.text
            if added.normalized and self.backend.normalizer is not None:
                text = self.backend.normalizer.normalize_str(text)
            # Gemma adds runs of "▁", which are spaces there, too.
            text = text if self.byte_level else text.replace("▁", " ")
            pieces[added.id] = b"" if added.hidden else text.encode("utf-8")
        return pieces


# --- tokenizer.json ---


def read_folder(files: core.ModelFiles) -> Vocabulary:
    """A folder in Hugging Face's layout: tokenizer.json, and, where present, tokenizer_config.json,
    chat_template.jinja, additional_chat_templates/, special_tokens_map.json,
    generation_config.json and config.json."""
    folder = Path(files.path)
    path = folder / "tokenizer.json"
    spec = files.json("tokenizer.json")
    if spec is None:
        raise native.ModelFileError(
            f"{path}: no such file; a tokenizer is read from tokenizer.json, which "
            "save_pretrained() of a fast tokenizer writes"
        )
    config = files.json("tokenizer_config.json") or {}
    specials = files.json("special_tokens_map.json") or {}
    model, decoder = spec.get("model"), _decoder_parts(spec.get("decoder"))
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind not in ("BPE", "Unigram"):
        raise native.ModelFileError(f"{path}: expected a BPE or Unigram model, got {kind}")
    if not decoder.keys() & {"ByteLevel", "Metaspace", "ByteFallback", "Replace"}:
        got = ", ".join(decoder) or "none"
        expected = "a byte-level or SentencePiece decoder"
        raise native.ModelFileError(f"{path}: expected {expected}, got {got}")
    eos_ids = tuple(files.eos_ids())
    added = hide_ends(_added_tokens(path, spec, config), eos_ids)
    if kind == "Unigram":  # whose vocabulary is a list: no token can be put at an id
        added = tuple(replace(token, normalized=False) for token in added)
    spec = _plain_spec(spec, added)
    backend = _backend(path, spec)
    variables = _template_variables(specials) | _template_variables(config)
    bos_token = variables.get("bos_token", "")
    bos = next((token.id for token in added if token.text == bos_token), None)
    if bos is None:
        bos = backend.token_to_id(bos_token)
    named = (files.json("config.json") or {}).get("bos_token_id")
    if bos is None and isinstance(named, int):
        bos = named
    return Vocabulary(
        backend=backend,
        continuation=_continuation(path, spec, backend),
        byte_level="ByteLevel" in decoder,
        strips_space=_strips_space(decoder),
        added=added,
        bos_id=bos,
        eos_ids=eos_ids,
        chat_templates=_folder_templates(folder, config),
        special_tokens=variables,
        source=str(folder),
    )


def hide_ends(added: Iterable[AddedToken], eos_ids: Sequence[int]) -> tuple[AddedToken, ...]:
    """An end is no part of the text, whatever the file says of its token."""
    return tuple(
        replace(t, special=True, normalized=False) if t.id in eos_ids else t for t in added
    )


def _template_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """What a template may call by name, as "eos_token": keys of that kind, and a model's own."""
    own = config.get("extra_special_tokens")
    named = {key: token for key, token in config.items() if key.endswith("_token")}
    named |= own if isinstance(own, dict) else {}
    return {key: text for key, token in named.items() if (text := _token_text(token)) is not None}


def _plain_spec(spec: Mapping[str, Any], added: Iterable[AddedToken]) -> dict[str, Any]:
    """tokenizer.json as a backend is made of it."""
    # Truncation would cut a prompt without a word; the post-processor's BOS is the caller's to add;
    # dropout, for training, would spell a text in another way each time.
    plain: dict[str, Any] = dict.fromkeys(("post_processor", "truncation", "padding"))
    model = dict(spec["model"])
    if "dropout" in model:
        model["dropout"] = None
    listed = [
        {"content": token.text, **{k: v for k, v in vars(token).items() if k != "text"}}
        for token in added
        if token.normalized
    ]
    if listed:  # part of the vocabulary too: without the others, the library would renumber them
        model["vocab"] = model["vocab"] | {entry["content"]: entry["id"] for entry in listed}
    return {**spec, **plain, "model": model, "added_tokens": listed}


def _decoder_parts(decoder: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(decoder, dict):
        return {}
    listed = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return {str(part.get("type")): part for part in listed if isinstance(part, dict)}


def _strips_space(parts: Mapping[str, dict[str, Any]]) -> bool:
    strip, metaspace = parts.get("Strip"), parts.get("Metaspace")
    if metaspace is not None:
        default = "always" if metaspace.get("add_prefix_space", True) else "never"
        return bool(metaspace.get("prepend_scheme", default) != "never")
    return strip is not None and strip.get("content") == " " and strip.get("start", 0) > 0


def _backend(path: Path, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    with said_by_library(lambda error: f"{path}: not a tokenizer: {error}"):
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


@contextlib.contextmanager
def said_by_library(message: Callable[[BaseException], str]) -> Iterator[None]:
    """A ModelFileError for what the library raises: bare Exceptions, and where its Rust panics what
    is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise native.ModelFileError(message(error)) from None


def _continuation(
    path: Path, spec: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> tokenizers.Tokenizer:
    """Metaspace can put its "▁" before the very first word alone, and not after control tokens."""
    text = json.dumps(spec.get("pre_tokenizer"))
    if '"prepend_scheme": "first"' not in text:
        return backend
    never = json.loads(text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
    return _backend(path, {**spec, "pre_tokenizer": never})


def _added_tokens(
    path: Path, spec: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    """tokenizer.json's added tokens with the flags that tokenizer_config.json gives them, and those
    that it alone names."""
    found: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    try:
        listed = [(int(entry["id"]), entry) for entry in spec.get("added_tokens", [])]
        own = len(listed)
        listed += [(int(i), e) for i, e in config.get("added_tokens_decoder", {}).items()]
        for place, (token, entry) in enumerate(listed):
            text = entry["content"]
            if not isinstance(text, str) or not text or token < 0:
                continue
            if place >= own:
                token = ids.get(text, token)
            if token in found and found[token].text != text:
                continue
            flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
            flag = {name: bool(entry.get(name, False)) for name in flags}
            made = AddedToken(id=token, text=text, **flag)
            found[token] = replace(made, normalized=made.normalized and not made.control)
            ids.setdefault(text, token)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise native.ModelFileError(f"{path}: damaged list of added tokens: {error!r}") from None
    return tuple(found.values())


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object holding it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Those of tokenizer_config.json, and over them those in files of their own."""
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
    elif not isinstance(named, dict):
        named = {"default": named}
    found = {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}
    files = {p.stem: p for p in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    for name, file in files.items():
        try:
            found[name] = file.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise native.ModelFileError(f"{file}: expected UTF-8 text: {error}") from None
    return found


# --- bytes of tokens ---


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes, in order,
    for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _bytes_of_byte_level(text: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in text])
    except KeyError:  # outside of the alphabet: a token that was added as plain text
        return text.encode("utf-8")


def _bytes_of_sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace("▁", " ").encode("utf-8")
