"""Does the response follow from its source, or would it have been written without it as well?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from alignpro.optional import import_for
from alignpro.rewards.check import CONVERSATIONS, SOURCE, Unread, read_rows
from alignpro.rewards.topic import content_stems
from alignpro.types import (
    AnswerScorer,
    Conversation,
    Prompt,
    SamplingParams,
    Texts,
    not_unicode,
)

_METHODS = ("likelihood", "words")


class GroundingReward:
    """How much likelier the source makes the response, or how much of it the source holds.

    method:
        "likelihood": log p(y | source, prompt) - log p(y | prompt), the mean per token in nats,
            under the frozen target without an adapter. It is what the words owe to the source: 0
            for what would have been said anyway, below 0 for what the source speaks against.
        "words": the share of the response's content words (as of the reward "topic") that the
            source holds, in [0, 1]; 0 for a response without any. No model is asked.

    Column "source": what the response is to be faithful to. Where it stands in the prompt, it is
    taken out of it for the second term, else put before it for the first. A row without one is
    held to the prompt itself, whose second term then reads an empty turn. The rewrite is not looked
    at: it is the *original* prompt that may be forgotten.
    """

    name = "grounding"

    def __init__(self, method: Literal["likelihood", "words"] = "likelihood") -> None:
        if method not in _METHODS:
            raise ValueError(f'method: expected "likelihood" or "words", got {method!r}')
        self._method = method
        self._scorer: AnswerScorer | None = None
        self._snowball: Any = None
        if method == "words":
            self._snowball = import_for("GroundingReward", "snowballstemmer")

    def use_scorer(self, scorer: AnswerScorer) -> None:
        """What scores texts: the frozen target, which a pipeline passes on when it is made."""
        if self._method == "likelihood" and not scorer.scores_answers:
            raise ValueError(
                f"reward 'grounding': {scorer.name} scores no given texts, as a model in this "
                "process does; reward=grounding#words asks no model"
            )
        self._scorer = scorer

    def unread_by(self, params: SamplingParams) -> Unread:
        """The model reads the source as well, which need not stand in the prompt."""
        scorer = self._scorer
        if self._method == "words" or scorer is None:
            return lambda prompt, columns: None
        too_long = scorer.unread_by(params)

        def unread(prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
            source = _as_source(columns.get(SOURCE))
            reads = with_and_without(Conversation.of(prompt), source)
            reason = next((r for r in map(too_long, reads) if r is not None), None)
            beside = "" if source is None else f" with column {SOURCE!r}"
            return None if reason is None else f"for reward 'grounding'{beside}: {reason}"

        return unread

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """A source is the data's to have."""
        read_rows("column 'source'", map(_as_source, columns.get(SOURCE) or ()))

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        given = columns.get(SOURCE) or [None] * len(prompts)
        sources = read_rows("column 'source'", map(_as_source, given))
        asked = columns.get(CONVERSATIONS) or prompts
        read = [
            with_and_without(Conversation.of(prompt), source)
            for prompt, source in zip(asked, sources, strict=True)
        ]
        if self._method == "words":
            held = [
                Conversation.of(prompt).text if source is None else source
                for prompt, source in zip(asked, sources, strict=True)
            ]
            stem = functools.cache(self._snowball.stemmer("english").stemWord)
            return [_share_held(y, of, stem) for of, y in zip(held, responses, strict=True)]
        if self._scorer is None:
            raise ValueError(
                "reward 'grounding': expected a target that scores texts, got none; it is given "
                "one by the pipeline that it is in"
            )
        with_source = self._scorer([pair[0] for pair in read], responses)
        without = self._scorer([pair[1] for pair in read], responses)
        return [a - b for a, b in zip(with_source, without, strict=True)]


def with_and_without(prompt: Conversation, source: str | None) -> tuple[Prompt, Prompt | None]:
    """What is read with the source, and what without it; None: nothing is left to read."""
    if source is None:
        return prompt.short, None
    if source in prompt.last_turn:
        rest = prompt.last_turn.replace(source, "", 1).strip()
        return prompt.short, prompt.with_last_turn(rest).short if rest else None
    return prompt.with_last_turn(f"{source}\n\n{prompt.last_turn}").short, prompt.short


def _share_held(response: str, source: str, stem: Callable[[str], str]) -> float:
    said = content_stems(response, stem)
    return len(said & content_stems(source, stem)) / len(said) if said else 0.0


def _as_source(value: Any) -> str | None:
    """A row's source; None where it has none. Raises ValueError for what is no text, or none that
    UTF-8 has."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    wrong = not_unicode(value or "")
    if wrong is not None:
        raise ValueError(wrong)
    return value if value and value.strip() else None
