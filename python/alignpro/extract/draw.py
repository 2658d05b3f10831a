"""Draws of records until one verifies: no text waits for another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alignpro.extract.check import Verdict, Violation, judge
from alignpro.extract.parse import Parsed, parse_json, parse_lines
from alignpro.extract.schema import Format, Schema
from alignpro.models.in_flight import InFlight
from alignpro.types import Conversation, Prompt, Response

# Queues a draw: (in flight, text, attempt, what gets the response, or None of one that failed).
Draw = Callable[[InFlight, int, int, Callable[[Response | None], None]], None]


@dataclass(frozen=True)
class Extraction:
    """The record of a text: the first draw that verified, or that with the fewest violations."""

    record: dict[str, Any] | None  # as the target wrote it; None: no draw was one
    violations: tuple[Violation, ...]
    attempts: int  # draws that were made
    answer: str  # what the target wrote; "" where it did not answer
    answered: bool = True  # False: no draw was answered, which says nothing of the text

    @property
    def verified(self) -> bool:
        return not self.violations

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it: record, verified, violations, attempts, answer; and answered, where
        no draw was."""
        plain: dict[str, Any] = {
            "record": self.record,
            "verified": self.verified,
            "violations": [violation.to_plain() for violation in self.violations],
            "attempts": self.attempts,
            "answer": self.answer,
        }
        return plain if self.answered else plain | {"answered": False}

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> Extraction:
        """What `to_plain` made of it. Raises KeyError or TypeError for anything else."""
        violations = tuple(Violation(**violation) for violation in plain["violations"])
        answered = bool(plain.get("answered", True))
        attempts, answer = int(plain["attempts"]), str(plain["answer"])
        return cls(plain["record"], violations, attempts, answer, answered)


def parse_answer(answer: str, form: Format) -> Parsed:
    """The record that a model wrote in this form."""
    return parse_json(answer) if form == "json" else parse_lines(answer)


def judge_answer(
    answer: str, schema: Schema, form: Format, source: str | None = None
) -> tuple[dict[str, Any] | None, Verdict]:
    """The record of an answer, and what is wrong in it."""
    record, problem = parse_answer(answer, form)
    if record is None:
        expected = "one JSON object" if form == "json" else "a line for each field"
        violation = Violation("", "parse", problem, expected)
        return None, Verdict(violations=[violation])
    return record, judge(record, schema, source)


def extract_records(
    draw: Draw,
    prompts: Sequence[Prompt],
    schema: Schema,
    *,
    attempts: int,
    form: Format,
    max_failed: float,
    on_extracted: Callable[[int, Extraction], None] | None = None,
) -> list[Extraction]:
    """See `Pipeline.extract`."""
    best: dict[int, Extraction] = {}

    with InFlight(len(prompts) * attempts, max_failed) as in_flight:

        def drawn(place: int, attempt: int, response: Response | None) -> None:
            answer = "" if response is None else response.text
            source = Conversation.of(prompts[place]).last_turn
            record, verdict = judge_answer(answer, schema, form, source)
            violations, answered = tuple(verdict.violations), response is not None
            this = Extraction(record, violations, attempt + 1, answer, answered)
            before = best.get(place)
            kept = this if before is None or _rank(this) < _rank(before) else before
            best[place] = replace(kept, attempts=attempt + 1)
            if not kept.verified and attempt + 1 < attempts:
                draw(in_flight, place, attempt + 1, partial(drawn, place, attempt + 1))
            elif on_extracted is not None:
                on_extracted(place, best[place])

        for place in range(len(prompts)):
            draw(in_flight, place, 0, partial(drawn, place, 0))
        in_flight.run_until_done()
    return [best[place] for place in range(len(prompts))]


def _rank(extraction: Extraction) -> tuple[bool, bool, int]:
    return not extraction.answered, extraction.record is None, len(extraction.violations)
