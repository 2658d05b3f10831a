"""What a tokenizer knows, read from the metadata of a GGUF file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from alignpro import native
from alignpro.models.pre_tokenizer import NAMES, Rule, inferred_rule, named_rule
from alignpro.models.vocabulary import MARKER, AddedToken, Vocabulary, hide_ends, said_by_library

_log = logging.getLogger(__name__)

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

# What may be an ordinary word ("</s>" is HTML), and is a marker where the file names it as its BOS
# or its end.
_NAMED_MARKER = re.compile(r"_?<[^\s<>]+>|\[[^\s\[\]]+\]")


def read_gguf(
    metadata: Mapping[str, Any],
    source: str = "GGUF metadata",
    eos_ids: Sequence[int] | None = None,
) -> Vocabulary:
    """The tokenizer inside a GGUF file, from its metadata keys ``tokenizer.*``.

    Args:
        source: the file's name, for error messages.
        eos_ids: what ends a text (`core.ModelFiles.eos_ids`); None finds it in the metadata.
    """
    gguf = _Gguf(metadata, source)
    model = gguf.get("tokenizer.ggml.model", str)
    tokens: list[str] = gguf.listed("tokenizer.ggml.tokens", str)
    types: list[int] = gguf.listed("tokenizer.ggml.token_type", int, default=[1] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise gguf.error(f"{len(tokens)} tokens and {len(types)} token types; expected as many")
    named = {
        name: gguf.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    if eos_ids is None:
        ids = [gguf.get(key, int, default=-1) for key in native.core.GGUF_END_KEYS]
        eos_ids = native.core.end_of_text_ids(ids, tokens, types)
    ends = tuple(eos_ids)
    types = _control_types(source, tokens, types, {named["bos_token"], *ends})
    if model == "gpt2":
        vocabulary = _byte_level_bpe(gguf, tokens, types)
    elif model == "llama":
        vocabulary = _sentencepiece_bpe(gguf, tokens, types)
    else:
        raise gguf.error(f"tokenizer.ggml.model: expected gpt2 or llama, got {model!r}")
    swallows = _swallows_space(gguf, model)
    added = tuple(
        AddedToken(id=i, text=text, special=kind != _USER_DEFINED, rstrip=swallows(text, kind))
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and text
    )
    return replace(
        vocabulary,
        added=hide_ends(added, ends),
        bos_id=named["bos_token"],
        eos_ids=ends,
        chat_templates=_gguf_templates(gguf, metadata),
        special_tokens={name: tokens[i] for name, i in named.items() if i is not None},
        source=source,
    )


def _control_types(
    source: str, tokens: Sequence[str], types: Sequence[int], named: Set[int | None]
) -> list[int]:
    """The types with markers as control tokens. Some exporters type them as ordinary tokens; text
    would turn into them, and they would show in it.

    named: ids that the file names as its BOS or an end.
    """
    found = [
        i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _NORMAL
        and (MARKER.fullmatch(text) or (i in named and _NAMED_MARKER.fullmatch(text)))
    ]
    if found:
        _log.warning(
            "%s: typed as ordinary tokens, taken as the control tokens they look like: %s",
            source,
            ", ".join(tokens[i] for i in found[:8]) + (", ..." if len(found) > 8 else ""),
        )
    changed = dict.fromkeys(found, _CONTROL)
    return [changed.get(i, kind) for i, kind in enumerate(types)]


def _swallows_space(gguf: _Gguf, model: str) -> Callable[[str, int], bool]:
    """Whether a token of this text and type swallows the white space to its right. The format has
    no key for it. Phi-3's markers do, and its template writes line ends behind them."""
    name = gguf.get("general.name", str, default="").lower()
    is_phi3 = gguf.get("general.architecture", str, default="") == "phi3" or any(
        part in name for part in ("phi-3", "phi3")
    )
    if not is_phi3 or model != "llama":  # Phi-4 has the architecture, and a tokenizer of its own
        return lambda text, kind: False
    kept = ("<unk>", "<s>", "<|endoftext|>")
    return lambda text, kind: text == "</s>" or (kind == _CONTROL and text not in kept)


def _gguf_templates(gguf: _Gguf, metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    named = [k.removeprefix(f"{key}.") for k in metadata if k.startswith(f"{key}.")]
    found = {name: gguf.get(f"{key}.{name}", str) for name in named}
    default = gguf.get(key, str, default=None)
    return found if default is None else {**found, "default": default}


class _Gguf:
    """Metadata with the checks that a file from outside needs."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def error(self, message: str) -> Exception:
        return native.ModelFileError(f"{self.source}: {message}")

    def get(self, key: str, kind: type, **default: Any) -> Any:
        if key not in self.metadata:
            if "default" in default:
                return default["default"]
            raise self.error(f"no {key}; the file holds no tokenizer that can be read")
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    def listed(self, key: str, kind: type, **default: Any) -> list[Any]:
        value: list[Any] = self.get(key, list, **default)
        if kind is float:  # some writers choose the type by the values, and scores are whole
            value = [float(i) if type(i) is int else i for i in value]
        if not all(isinstance(item, kind) for item in value):
            raise self.error(f"{key}: expected a list of {kind.__name__}")
        return value

    def token_id(self, key: str, size: int) -> int | None:
        """An id that cannot be is none: writers put -1, or the size of the vocabulary, for that."""
        value: int | None = self.get(key, int, default=None)
        if value is not None and not 0 <= value < size:
            _log.warning(
                "%s: %s is %d, and ids are below %d: taken as none", self.source, key, value, size
            )
            return None
        return value

    def rule(self) -> Rule:
        """How words are cut, which decides the ids of every text."""
        key = "tokenizer.ggml.pre"
        name = self.get(key, str, default="default")
        if name == "default":
            guess, rule = inferred_rule(self.metadata)
            _log.warning(
                "%s: no %s says how text is cut into words; taken as %s. Where the model was made "
                "with another rule, all it reads is spelled wrongly: use a newer conversion",
                *(self.source, key, guess),
            )
            return rule
        known = named_rule(name)
        if known is None:
            raise self.error(
                f"{key}: words cut as {name!r} are not supported; expected one of "
                f"{', '.join(NAMES)}, or the original folder with its tokenizer.json"
            )
        return known


def _byte_level_bpe(gguf: _Gguf, tokens: Sequence[str], types: Sequence[int]) -> Vocabulary:
    rule = gguf.rule()
    merges = []
    for merge in gguf.listed("tokenizer.ggml.merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise gguf.error(f"tokenizer.ggml.merges: expected two tokens, got {merge!r}")
        merges.append((left, right))
    backend = _bpe(gguf, tokens, types, merges, ignore_merges=rule.ignore_merges)
    backend.pre_tokenizer = rule.pre_tokenizer()
    if (normalizer := rule.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return Vocabulary(backend, backend, byte_level=True, strips_space=False)


def _sentencepiece_bpe(gguf: _Gguf, tokens: Sequence[str], types: Sequence[int]) -> Vocabulary:
    scores = gguf.listed("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise gguf.error(f"{len(tokens)} tokens and {len(scores)} scores; expected as many")
    if len({s for s, kind in zip(scores, types, strict=True) if kind == _NORMAL}) == 1:
        _log.warning(
            "%s: tokenizer.ggml.scores are all the same and say nothing of how text is merged; the "
            "order of the tokens is taken",
            gguf.source,
        )
    prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, default=True)
    unknown = gguf.token_id("tokenizer.ggml.unknown_token_id", len(tokens))
    backend = _bpe(
        gguf,
        tokens,
        types,
        _merges_from_scores(tokens, types, scores),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    replace_space = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace_space]) if prefix else replace_space
    )
    return Vocabulary(backend, backend, byte_level=False, strips_space=prefix)


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges behind a SentencePiece BPE vocabulary: every way to make a token of two others,
    the better score first, then the earlier piece."""
    ids = {text: i for i, text in enumerate(tokens) if types[i] in (_NORMAL, _UNUSED)}
    merges = []
    for text, token in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-scores[token], token, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)]


def _bpe(
    gguf: _Gguf,
    tokens: Sequence[str],
    types: Sequence[int],
    merges: list[tuple[str, str]],
    **options: Any,
) -> tokenizers.Tokenizer:
    # Control tokens stay outside, so that no text can be merged into one. Of added words those are
    # in, that text is merged into.
    made = {left + right for left, right in merges}
    ids = {t: i for i, t in enumerate(tokens) if types[i] == _USER_DEFINED and t in made}
    wanted = (_CONTROL, _USER_DEFINED)
    ids |= {text: i for i, text in enumerate(tokens) if types[i] not in wanted}
    unfit = f"{gguf.source}: tokenizer: vocabulary and merges do not fit"
    known = ids.keys()
    for left, right in merges:  # the library says it of some by a panic
        if not {left, right, left + right} <= known:
            pair = f"{left!r}, {right!r} or what they make"
            raise native.ModelFileError(f"{unfit}: {pair} is no token of text")
    with said_by_library(lambda error: f"{unfit}: {error}"):
        return tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
