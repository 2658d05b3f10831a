"""Does the response follow the house rule of its prompt's kind? Exact checks, no model.

The score is format times topic. Format is 0 to 1 and belongs to the kind (`KINDS`); topic is the
share of the prompt's content words that the response mentions (`TopicReward`), full at one half.
What would earn a check without an answer earns nothing: empty or repeated items, a bare "Yes", the
prompt said back, warm words without the matter, the same words over and over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.rewards.check import no_column, read_rows, score_checked
from alignpro.rewards.topic import TopicReward
from alignpro.types import Texts

# Ends a line that is whole: a full stop, perhaps inside quotes, brackets or emphasis.
_ENDED = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]*_`]*$")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*_`]*(?=\s|$)")
_ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|mt|st|prof|vs|etc|approx|e\.g|i\.e|a\.m|p\.m|u\.s|u\.k|[a-z])\.$", re.I
)
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
# List markers, at the start of a line.
_STEP = re.compile(r"^[ \t*_#]*(?:step[ \t]+)?(\d{1,2})[.):](?=[\s*_]|$)", re.M | re.I)
_BULLET = re.compile(r"^[ \t]*[-*\u2022+](?=\s|$)", re.M)
_YES_OR_NO = re.compile(r"[\W_]*(?:yes|no)\b(?!\s*(?:/|,|or\b|and\b)\s*(?:yes|no)\b)\W", re.I)
_OPENS_WITH_VERDICT = re.compile(r"[\W_]*(?:yes|no)\b(?:[\W_]|$)", re.I)

# Each is one way of being warm to somebody in trouble; a way counts once.
_FEELING = (
    r"(?:hard|tough|painful|difficult|frightening|scary|stressful|overwhelming|heartbreaking|"
    r"devastating|upsetting|sad|lonely|exhausting|frustrating|disappointing|challenging|awful)"
)
_WARM = [
    re.compile(pattern, re.I)
    for pattern in (
        r"\bsorry (?:to (?:hear|learn|see)|(?:that|for|about) (?:you|this|that|what))",
        r"\bhere (?:for you|to (?:listen|support|comfort|help you))|\b(?:lean|count) on me\b",
        r"\b(?:not|never|aren't) alone\b|\bin this together\b|\bby your side\b",
        r"\bunderstandable\b|\bi (?:can |do |truly |completely )?(?:understand|imagine|know) how\b"
        r"|\bi (?:can only|can) imagine\b|\bi feel for you\b",
        r"\b(?:it's|it is|that's) (?:\w+ )?(?:ok|okay|alright|all right|normal|natural)\b",
        r"\bi (?:\w+ )?hope you\b|\b(?:it|things|this) (?:too )?(?:will|shall) (?:pass|be|get)\b",
        r"\b(?:kind|gentle|patient|good) (?:to|with) yourself\b|\btake (?:good |some )?care\b"
        r"|\btake (?:a deep breath|it (?:easy|one))",
        r"\b(?:hugs?|sympathy|condolences|my heart|heart goes out|thoughts are with)\b",
        rf"\b(?:must|can|may) (?:be|feel) (?:\w+ ){{0,3}}{_FEELING}\b",
        rf"\b(?:so|such a|really|very|incredibly|a) {_FEELING} (?:time|day|thing|moment|experience|"
        r"situation|loss)\b",
        r"\bdon't (?:worry|be too hard|blame yourself|give up)\b|\byou(?:'ve| have) got this\b",
        r"\byou(?:'ll| will| can| are going to) (?:be (?:ok|okay|fine)|get (?:through|over)|"
        r"overcome|recover|heal|feel better)\b",
        r"\byou(?:'re| are) (?:\w+ )?(?:strong|brave|loved|good enough|doing your best)\b",
    )
]
REFUSAL = re.compile(
    r"\bas an ai\b|\b(?:can't|cannot|can not|unable to|not able to) (?:assist|help|provide|offer)",
    re.I,
)

_CUT = 0.5  # what is left of a format whose response does not end
_EXPECTED = (
    'an object such as {"sentences": 2, "words": [10, 40], "begins": "Dear", "about": "tea"}'
)


@dataclass(frozen=True)
class _Answer:
    """A response and what its checks read of it."""

    text: str
    prompt: str
    requirement: Mapping[str, Any]
    share: Callable[[str, str], float]

    @property
    def words(self) -> int:
        return len(_WORD.findall(self.text))

    @property
    def repeats_itself(self) -> bool:
        """Under two words in five are distinct: prose of this length has three and more."""
        words = _WORD.findall(self.text.casefold())
        return len(words) >= 20 and len(set(words)) < 0.4 * len(words)

    @property
    def is_cut(self) -> bool:
        """It does not end as a sentence does: at the limit of new tokens, most likely."""
        return not _ENDED.search(self.text)

    @property
    def says_something(self) -> bool:
        """It has content words of its own, beside those of the prompt."""
        return self.share(self.text, self.prompt) < 1

    @property
    def says_the_prompt_back(self) -> bool:
        return " ".join(_WORD.findall(self.prompt)).casefold() in (
            " ".join(_WORD.findall(self.text)).casefold()
        )

    @property
    def opens_with_verdict(self) -> bool:
        return bool(_OPENS_WITH_VERDICT.match(self.text))

    @property
    def has_list(self) -> bool:
        return bool(_STEP.search(self.text) or _BULLET.search(self.text))

    @property
    def sentences(self) -> int:
        """How many there are; what is left of a line without its end counts as one."""
        count = 0
        for line in self.text.split("\n"):
            begin = 0
            for end in _SENTENCE_END.finditer(line):
                if not _ABBREVIATION.search(line[begin : end.end()]):
                    count, begin = count + 1, end.end()
            count += bool(_WORD.search(line, begin))
        return count

    @property
    def listed(self) -> int:
        """Items in a row, parted by commas; 0 where one has no word."""
        items = re.split(r",\s*(?:and\b)?|\band\b", self.text)
        return len(items) if all(map(_WORD.search, items)) else 0

    @property
    def warmth(self) -> int:
        return sum(bool(way.search(self.text)) for way in _WARM)

    def list_score(self, marker: re.Pattern[str], least_words: int) -> float:
        """1 for three items that are whole and say something new, 2/3 for two, less if cut."""
        starts = list(marker.finditer(self.text))
        ends = [match.start() for match in starts[1:]] + [len(self.text)]
        items = [self.text[m.end() : end] for m, end in zip(starts, ends, strict=False)]
        # Items may all do without a full stop; then only a last one without words was surely cut.
        ended = any(_ENDED.search(item.strip()) for item in items[:-1])
        cut = bool(items) and ((self.is_cut and ended) or not _WORD.search(items[-1]))
        kept: list[str] = []
        for item in items[:-1] if cut else items:
            if len(_WORD.findall(item)) >= least_words and self.share(item, " ".join(kept)) <= 0.6:
                kept.append(item)
        if len(kept) >= 3:
            return 1.0
        return (_CUT if cut else 1.0) * 2 / 3 if len(kept) == 2 else 0.0

    def score(self, kind: str) -> float:
        return 0.0 if self.repeats_itself else KINDS[kind](self)


def _how_to(answer: _Answer) -> float:
    """Numbered steps, counted from 1."""
    numbers = [int(match[1]) for match in _STEP.finditer(answer.text)]
    if numbers != list(range(1, len(numbers) + 1)):
        return 0.0
    return answer.list_score(_STEP, least_words=3)


def _yes_no(answer: _Answer) -> float:
    """Yes or No, then more than that."""
    if not _YES_OR_NO.match(answer.text) or answer.words < 5 or answer.says_the_prompt_back:
        return 0.0
    return _CUT if answer.is_cut else 1.0


def _ideas(answer: _Answer) -> float:
    """A list, with bullets or numbers."""
    return max(answer.list_score(marker, least_words=1) for marker in (_BULLET, _STEP))


def _fact(answer: _Answer) -> float:
    """One short sentence, which is no verdict."""
    one = answer.sentences == 1 and not answer.is_cut and not answer.text.endswith("?")
    plain = not answer.has_list and not answer.opens_with_verdict
    return float(one and plain and 4 <= answer.words <= 25 and answer.says_something)


def _trouble(answer: _Answer) -> float:
    """Warm words in prose: one way of being warm is half, two are all, and may be cut after."""
    if answer.has_list or answer.opens_with_verdict or answer.words < 8:
        return 0.0
    if REFUSAL.search(answer.text) or not answer.says_something:
        return 0.0
    return min(answer.warmth, 2) / 2


def _as_asked(answer: _Answer) -> float:
    """What the prompt itself asks, and no trace of a house rule."""
    wanted = answer.requirement
    held = [answer.text.casefold().lstrip("\"'\u201c* ").startswith(wanted["begins"].casefold())]
    counts = {"sentences": answer.sentences, "words": answer.words, "items": answer.listed}
    for name in wanted.keys() & counts.keys():
        least, most = wanted[name]
        held.append(least <= counts[name] <= most)
    if "sentences" in wanted:
        held.append(answer.sentences - answer.is_cut >= wanted["sentences"][0])
    pushed = answer.has_list or (answer.opens_with_verdict and not wanted["begins"])
    return float(all(held) and not pushed)


KINDS: dict[str, Callable[[_Answer], float]] = {
    "how_to": _how_to,
    "yes_no": _yes_no,
    "ideas": _ideas,
    "fact": _fact,
    "trouble": _trouble,
    "as_asked": _as_asked,
}


class HouseRulesReward:
    """Format times topic, by the column ``kind``: one of `KINDS`, which no model reads.

    Kind "as_asked" is a prompt that already says how to answer. Its column ``requirement`` says
    what is checked instead: ``sentences``, ``words`` or ``items`` parted by commas (a number, or
    [least, most]), ``begins`` (the first words) and ``about`` (text whose words are the topic;
    without it, the prompt's own). All must hold, and no list and no verdict may be pushed on it.

    Raises ValueError for a missing column, an unknown kind, or a requirement of another form.
    """

    name = "house_rules"

    def __init__(self) -> None:
        self._share_of = TopicReward()

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        rows = len(columns.get("kind", ()))
        read_rows(f"reward {self.name!r}", _rules(columns, rows))

    def components(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> dict[str, list[float]]:
        """``format`` and ``topic``, each [rows] in [0, 1]."""
        return {
            part.__name__: score_checked(part, prompts, rewrites, responses, columns)
            for part in (self.format, self.topic)
        }

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The product of what ``components`` returned: [rows]."""
        return [f * t for f, t in zip(components["format"], components["topic"], strict=True)]

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        return self.total(self.components(prompts, rewrites, responses, **columns))

    def format(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        """How far each response follows the rule of its kind."""
        return [
            _Answer(
                response.strip().replace("\u2019", "'"), prompt, requirement, self._share
            ).score(kind)
            for prompt, response, (kind, requirement) in zip(
                prompts, responses, _rules(columns, len(prompts)), strict=True
            )
        ]

    def topic(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        """The share of the topic's content words that each response mentions; a half is all."""
        return [
            min(1.0, 2 * self._share(requirement.get("about", prompt), response))
            for prompt, response, (_, requirement) in zip(
                prompts, responses, _rules(columns, len(prompts)), strict=True
            )
        ]

    def _share(self, topic: str, text: str) -> float:
        """The share of the content words of ``topic`` that ``text`` mentions; 1 without any."""
        return self._share_of([topic], [""], [text])[0]


def _rules(columns: Mapping[str, Sequence[Any]], rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kind of every row, and what a prompt that says how to answer asks for."""
    if "kind" not in columns:
        raise ValueError(no_column("kind", columns))
    for kind, given in zip(columns["kind"], columns.get("requirement", [None] * rows), strict=True):
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        yield kind, _checked_requirement(given) if kind == "as_asked" else {}


def _checked_requirement(given: Any) -> dict[str, Any]:
    """What a row's prompt asks for: counts as (least, most), and "begins" is always there."""
    asked: dict[str, Any] = {"begins": ""}
    for name, value in given.items() if isinstance(given, Mapping) else ():
        if value is None:  # Parquet has every key in every row
            continue
        counts = list(value) if isinstance(value, Sequence) else [value, value]
        if name in ("begins", "about") and isinstance(value, str):
            asked[name] = value
        elif (
            name in ("sentences", "words", "items")
            and len(counts) == 2
            and all(type(count) is int for count in counts)
        ):
            asked[name] = counts
        else:
            raise ValueError(f"requirement {name!r}: expected {_EXPECTED}, got {value!r}")
    if asked.keys() <= {"begins", "about"} and not asked["begins"]:
        raise ValueError(f"requirement: expected {_EXPECTED}, got {given!r}")
    return asked
