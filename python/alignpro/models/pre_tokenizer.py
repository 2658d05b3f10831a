"""How a byte-level tokenizer cuts text into words before merging, by GGUF's tokenizer.ggml.pre.

The expressions are part of the models, as their tokenizer.json has them. The names are
llama.cpp's, which has many for one rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words end where capitals begin.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
    r"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """A way to cut text into words."""

    expression: str | None = None  # None: GPT-2's own, which the library has
    single_digits: bool = False
    ignore_merges: bool = False  # a word that is a token is taken, whether or not merges lead there
    nfc: bool = False

    def pre_tokenizer(self) -> Any:
        words: list[Any] = []
        if self.single_digits:
            words.append(pre_tokenizers.Digits(individual_digits=True))
        if self.expression is not None:
            words.append(pre_tokenizers.Split(tokenizers.Regex(self.expression), "isolated"))
        byte_level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=self.expression is None
        )
        return pre_tokenizers.Sequence([*words, byte_level])

    def normalizer(self) -> Any:
        return normalizers.NFC() if self.nfc else None


_THREE_DIGITS = _WORDS.format(digits=r"\p{N}{1,3}")
_RULES = {
    "gpt-2": Rule(),
    "smollm": Rule(single_digits=True),
    "qwen2": Rule(_WORDS.format(digits=r"\p{N}"), nfc=True),
    "llama-bpe": Rule(_THREE_DIGITS, ignore_merges=True),
    "dbrx": Rule(_THREE_DIGITS),
    "tekken": Rule(
        _CASED.format(upper=_UPPER, lower=_LOWER, end="", digits=r"\p{N}"), ignore_merges=True
    ),
    "gpt-4o": Rule(
        _CASED.format(upper=_UPPER, lower=_LOWER, end=f"{_CONTRACTIONS}?", digits=r"\p{N}{1,3}")
    ),
}
_OTHER_NAMES = {
    "gpt-2": ("phi-2", "gigachat", "exaone4", "a.x-4.0", "mellum"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "megrez"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    "dbrx": ("smaug-bpe",),
    "gpt-4o": ("llama4",),
}
_NAMED = {
    **_RULES,
    **{other: _RULES[name] for name, others in _OTHER_NAMES.items() for other in others},
}
NAMES = tuple(_RULES)
_LLAMA_3_TOKENS = 128_256


def named_rule(name: str) -> Rule | None:
    """The rule of a name in tokenizer.ggml.pre; None where it is not known."""
    return _NAMED.get(name)


def inferred_rule(metadata: Mapping[str, Any]) -> tuple[str, Rule]:
    """(name, rule) of a file that names none, as converters of before May 2024 wrote them: by what
    its architecture's models have, GPT-2's otherwise."""
    architecture = metadata.get("general.architecture")
    tokens = metadata.get("tokenizer.ggml.tokens")
    name = "gpt-2"
    if architecture in ("qwen2", "qwen3"):
        name = "qwen2"
    elif architecture == "llama" and isinstance(tokens, list) and len(tokens) == _LLAMA_3_TOKENS:
        name = "llama-bpe"
    return name, _RULES[name]
