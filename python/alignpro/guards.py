"""Checks of a rewrite against its prompt: pure functions of text, each conservative.

A guard that cannot tell lets the rewrite pass: it is there for what is plainly wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from alignpro.config import GuardConfig, Prompting
from alignpro.types import Conversation, Prompt, Rewrite


@dataclass(frozen=True)
class Candidate:
    """A rewrite before it is used."""

    prompt: str  # the last user turn
    turn: str  # what would stand in its place
    text: str  # what the prompter wrote
    was_cut: bool = False  # by its token limit


def broken_guard(candidate: Candidate, prompting: Prompting, guards: GuardConfig) -> str | None:
    """The first guard that the candidate breaks: "spans", "language", "length", "cut", "answered"
    or "echo"; None where it keeps all that are on."""
    for name, is_on, breaks in _GUARDS:
        if is_on(guards) and breaks(candidate, prompting, guards):
            return name
    return None


def broken_by(
    rewrite: Rewrite, prompt: Prompt, prompting: Prompting, guards: GuardConfig
) -> str | None:
    """The first guard that a rewrite of the prompt breaks, as `broken_guard`; None of one without
    text, which leaves the prompt as it is."""
    if not rewrite.text:
        return None
    turn = Conversation.of(prompt).last_turn
    new = prompting.rewritten(turn, rewrite.text)
    was_cut = rewrite.finish_reason == "length"
    return broken_guard(Candidate(turn, new, rewrite.text, was_cut), prompting, guards)


# --- verbatim spans ---

# Each leaves out what begins it, so that a text is read once and not once from every beginning on:
# `re` keeps every other thread waiting.
_PROTECTED = re.compile(
    r"\[protected\]((?:(?!\[protected\]).)*?)\[/protected\]", re.DOTALL | re.IGNORECASE
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"'`)\]}]+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]*\w")
_QUOTED = re.compile(
    r"\"([^\"\n]{2,})\"|\u201c([^\u201c\u201d\n]{2,})\u201d|\u00ab([^\u00ab\u00bb\n]{2,})\u00bb"
    r"|\u201e([^\u201e\u201c\u201d\n]{2,})[\u201c\u201d]"
)
_NUMBER = re.compile(r"(?<![\w.,])[-+\u2212]?\d+(?:[.,:/]\d+)*(?:[eE][-+]?\d+)?%?")


def verbatim_spans(text: str) -> list[str]:
    """What a rewrite of the text has to keep as it is, numbers aside."""
    spans = [match for pattern in (_PROTECTED, _FENCE, _CODE) for match in pattern.findall(text)]
    spans += [address.rstrip(".,;:!?") for address in _ADDRESS.findall(text)]
    spans += [next(filter(None, groups)) for groups in _QUOTED.findall(text)]
    return [span.strip() for span in spans if span.strip()]


def numbers(text: str) -> set[str]:
    return set(_NUMBER.findall(text))


def _loses_spans(candidate: Candidate, _: Prompting, __: GuardConfig) -> bool:
    prompt, turn = candidate.prompt, candidate.turn
    if prompt in turn:  # append, and whatever keeps all of it
        return False
    kept = all(span in turn for span in set(verbatim_spans(prompt)))
    return not (kept and numbers(prompt) <= numbers(turn))


# --- language ---

# Frequent words that few others of them have, in small letters.
_WORDS = {
    "en": "the and is are what how with this that which from does would should why when you your",
    "de": "der die das und ist nicht ein eine wie mit auf für von wird sind warum ich sie auch dem",
    "fr": "le les des est une pour dans que qui avec sur comment pourquoi vous je pas ce cette du",
    "es": "el los las es una para con por qué cómo y del que se cuál como está son más",
    "it": "il gli che di è una per con come perché sono della nel non cosa più questo anche",
    "pt": "o os as é uma para com como não que em do da porque são mais você qual dos",
    "nl": "de het een en is van niet hoe met voor waarom zijn dat op wat ik je aan ook",
}
_OF_WORD: dict[str, set[str]] = {}
for _language, _list in _WORDS.items():
    for _word in _list.split():
        _OF_WORD.setdefault(_word, set()).add(_language)
_FEWEST_LETTERS, _FEWEST_WORDS = 8, 2
# By Unicode's blocks, and not by unicodedata, which every version of Python has another one of.
_SCRIPTS = (
    *((0x41, 0x24F, "LATIN"), (0x370, 0x3FF, "GREEK"), (0x400, 0x52F, "CYRILLIC")),
    *((0x590, 0x5FF, "HEBREW"), (0x600, 0x6FF, "ARABIC"), (0x750, 0x77F, "ARABIC")),
    *((0x8A0, 0x8FF, "ARABIC"), (0x900, 0x97F, "DEVANAGARI"), (0xE00, 0xE7F, "THAI")),
    *((0x1100, 0x11FF, "HANGUL"), (0x1E00, 0x1EFF, "LATIN"), (0x1F00, 0x1FFF, "GREEK")),
    *((0x3005, 0x30FF, "CJK"), (0x3130, 0x318F, "HANGUL"), (0x31F0, 0x31FF, "CJK")),
    *((0x3400, 0x9FFF, "CJK"), (0xAC00, 0xD7FB, "HANGUL"), (0xF900, 0xFAFF, "CJK")),
    *((0xFB1D, 0xFB4F, "HEBREW"), (0xFB50, 0xFDFF, "ARABIC"), (0xFE70, 0xFEFF, "ARABIC")),
    *((0xFF21, 0xFF5A, "LATIN"), (0xFF66, 0xFF9F, "CJK"), (0x20000, 0x3FFFF, "CJK")),
)


def script(text: str) -> str | None:
    """The script of most of the letters; None of few letters or an even mixture. Han and kana are
    one, since Japanese is written in both."""
    seen: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            code = ord(char)
            names = (name for first, last, name in _SCRIPTS if first <= code <= last)
            seen[next(names, "other")] += count
    if not seen:
        return None
    (name, count), *_ = seen.most_common(1)
    # A syllable or an idea a sign: two of these are as much as a word.
    enough = 2 if name in ("CJK", "HANGUL") else _FEWEST_LETTERS
    return name if seen.total() >= enough and count > 0.6 * seen.total() else None


def language(text: str) -> str | None:
    """One of seven in Latin letters, by its function words; None where they do not tell."""
    seen: Counter[str] = Counter()
    for word, times in Counter(re.findall(r"[^\W\d_]+", text.casefold())).items():
        for owner in _OF_WORD.get(word, ()):
            seen[owner] += times
    if not seen:
        return None
    (first, count), *rest = seen.most_common(2)
    second = rest[0][1] if rest else 0
    return first if count >= _FEWEST_WORDS and count >= 2 * second else None


def _is_other_language(candidate: Candidate, _: Prompting, __: GuardConfig) -> bool:
    bare = [_FENCE.sub(" ", text) for text in (candidate.prompt, candidate.text)]
    for told in (script, language):
        before, after = told(bare[0]), told(bare[1])
        if before is not None and after is not None and before != after:
            return True
    return False


# --- length ---


def _is_too_long(candidate: Candidate, _: Prompting, guards: GuardConfig) -> bool:
    assert guards.max_growth is not None
    most = max(guards.free_characters, guards.max_growth * len(candidate.prompt))
    return len(candidate.text) > most


def _is_cut(candidate: Candidate, prompting: Prompting, _: GuardConfig) -> bool:
    """An instruction behind a whole prompt may end early; a prompt may not."""
    return candidate.was_cut and prompting.mode == "rewrite"


# --- an answer instead of a rewrite ---

_ANSWER = re.compile(
    r"(?:sure|certainly|of course|absolutely|yes|no|okay|great question)[,!.:]"
    r"|here(?:'s| is| are)\b|as an ai\b|i(?:'m| am) (?:sorry|an ai|happy to)\b|i (?:can't|cannot)\b"
    r"|the (?:correct |final )?answer (?:is|to)\b|answer:|to answer (?:this|your)\b"
    r"|(?:in conclusion|there you go)\b",
    re.IGNORECASE,
)


def _is_answer(candidate: Candidate, _: Prompting, __: GuardConfig) -> bool:
    begun = _ANSWER.match(candidate.text.lstrip(" \n\t\"'*"))
    return begun is not None and begun[0].casefold() not in candidate.prompt.casefold()


# --- the template, or a chat's markers, in the rewrite ---

_MARKERS = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|^#{2,} ?(?:instruction|response|input)\b"
    r"|^(?:user|assistant|system|human): ",
    re.IGNORECASE | re.MULTILINE,
)
_SHORTEST_ECHO = 12  # characters of a template's line; shorter ones are ordinary words


def _echoes(candidate: Candidate, prompting: Prompting, _: GuardConfig) -> bool:
    text, prompt = candidate.text.casefold(), candidate.prompt.casefold()
    marker = _MARKERS.search(candidate.text)
    if marker is not None and marker[0].casefold() not in prompt:
        return True
    pieces = [piece for piece in re.split(r"\{prompt\}|\n", prompting.template) if piece]
    echoed = [piece.strip().casefold() for piece in pieces]
    return any(
        len(piece) >= _SHORTEST_ECHO and piece in text and piece not in prompt for piece in echoed
    )


_Guard = tuple[
    str, Callable[[GuardConfig], bool], Callable[[Candidate, Prompting, GuardConfig], bool]
]
_GUARDS: tuple[_Guard, ...] = (
    ("echo", lambda on: on.echo, _echoes),
    ("answered", lambda on: on.answered, _is_answer),
    ("length", lambda on: on.max_growth is not None, _is_too_long),
    ("cut", lambda on: on.cut, _is_cut),
    ("language", lambda on: on.language, _is_other_language),
    ("spans", lambda on: on.spans, _loses_spans),
)
