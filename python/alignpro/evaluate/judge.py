"""Win rates by a judge that is asked in both orders.

The judge reads the original prompt, of a conversation every turn after its role, and two responses,
never a rewrite. Each pair is asked twice, with the responses in either order; verdicts that change
with the order are a tie, so that a judge which always says "A" prefers nothing. Every verdict is
kept in a file, from which a second run, or one after a crash, replays it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from alignpro.config import JudgeConfig
from alignpro.evaluate.arms import Arm
from alignpro.evaluate.progress import OnProgress
from alignpro.evaluate.results import Comparison, JudgeResult
from alignpro.files import append_line, read_kept
from alignpro.statistics import length_controlled_win_rate, ratio_of_means
from alignpro.types import Conversation, Usage

Verdict = Literal["A", "B", "tie"]
AGAINST = ("raw", "untuned", "static")  # what the trained prompter is compared with
_QUESTION = (
    "Two responses to a request are shown below. Decide which of them answers the request better: "
    "which is more helpful, correct and clear. Neither the order of the responses nor their length "
    "counts.\n\nRequest:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
    "Reply with the letter of the better response and nothing else: A or B."
)


class JudgeError(RuntimeError):
    """Too many questions stay without a verdict, or the judge cannot be reached at all."""


class Reply(NamedTuple):
    """What came of one question: a verdict, or None and why there is none."""

    verdict: Verdict | None
    text: str


class Judge(Protocol):
    """Answers questions in any order, as (index of the question, reply)."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """Everything about the judge that a verdict depends on."""

    @property
    def usage(self) -> Usage | None:
        """What its recorded calls to an endpoint took; None of a judge in this process."""

    def replies(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]: ...


def question_text(prompt: str, first: str, second: str) -> str:
    """One user turn. Braces in the texts stay what they are."""
    parts = {"prompt": prompt, "first": first, "second": second}
    head, *rest = _QUESTION.split("{")
    return head + "".join(parts[name] + text for name, text in (r.split("}", 1) for r in rest))


class VerdictFile:
    """Verdicts by question, as lines of JSON; without a path they are kept in memory alone.

    Holds the judge's name, the verdict, the reply and a hash of judge and question: no key, and no
    prompt.

    Raises:
        ValueError: a line that is no verdict; a last line that a crash cut short is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Verdict] = {}
        if path is not None and path.exists():
            read_kept(path, self._take, "a judge's verdict")

    def get(self, judge: Judge, question: str) -> Verdict | None:
        return self._known.get(_key(judge, question))

    def put(self, judge: Judge, question: str, reply: Reply) -> None:
        assert reply.verdict is not None
        key = _key(judge, question)
        self._known[key] = reply.verdict
        if self.path is not None:
            row = {"key": key, "judge": judge.name, "verdict": reply.verdict, "reply": reply.text}
            append_line(self.path, json.dumps(row))

    def _take(self, number: int, row: Any) -> None:
        key, verdict = row["key"], row["verdict"]
        if not isinstance(key, str) or verdict not in ("A", "B", "tie"):
            raise ValueError
        self._known[key] = verdict


@dataclass
class _Pair:
    """Two responses to one prompt, the trained prompter's first."""

    index: int  # of the prompt
    questions: tuple[str, str] | None  # trained first, trained second; None: they are the same text
    length_difference: int  # characters


def judge_arms(
    judge: Judge,
    arms: Mapping[str, Arm],
    config: JudgeConfig,
    *,
    seed: int = 0,
    verdicts: VerdictFile | None = None,
    on_progress: OnProgress | None = None,
) -> JudgeResult:
    """The trained prompter against every arm of ``AGAINST`` that is there.

    Pair j of a prompt is response j of either arm. Two responses that are the same text are a tie
    that nobody is asked about. Intervals resample prompts.

    Raises:
        JudgeError: more than ``max_failed`` of the questions got no verdict.
    """
    verdicts = verdicts if verdicts is not None else VerdictFile(None)
    pairs = {
        f"trained_vs_{name}": _pairs(arms["trained"], arms[name], config)
        for name in AGAINST
        if name in arms
    }
    asked = [q for group in pairs.values() for pair in group for q in pair.questions or ()]
    questions = list(dict.fromkeys(asked))
    answered, replayed, failed = _ask(judge, questions, config, verdicts, on_progress)
    comparisons = {name: _comparison(group, answered, seed=seed) for name, group in pairs.items()}
    return JudgeResult(judge.name, len(questions), replayed, failed, comparisons, usage=judge.usage)


def _pairs(trained: Arm, other: Arm, config: JudgeConfig) -> list[_Pair]:
    pairs = []
    for index, prompt in enumerate(trained.rollout.prompts[: config.num_prompts]):
        shown = Conversation.of(prompt).text
        # Where an answer failed, the pairs that are left.
        both = zip(trained.response_texts(index), other.response_texts(index), strict=False)
        for ours, theirs in list(both)[: config.num_pairs]:
            orders = question_text(shown, ours, theirs), question_text(shown, theirs, ours)
            pairs.append(_Pair(index, None if ours == theirs else orders, len(ours) - len(theirs)))
    return pairs


def _ask(
    judge: Judge,
    questions: Sequence[str],
    config: JudgeConfig,
    verdicts: VerdictFile,
    on_progress: OnProgress | None,
) -> tuple[dict[str, Verdict], int, int]:
    answered: dict[str, Verdict] = {}
    for question in questions:
        known = verdicts.get(judge, question)
        if known is not None:
            answered[question] = known
    replayed, failed = len(answered), 0
    left = [question for question in questions if question not in answered]
    allowed = int(config.max_failed * len(questions))
    for index, reply in judge.replies(left):
        if reply.verdict is None:
            failed += 1
            if failed > allowed:
                raise JudgeError(
                    f"judge {judge.name}: {failed} of {len(answered) + failed} questions got no "
                    f"verdict, more than max_failed ({config.max_failed:g} of {len(questions)}) "
                    f"allows; the last: {reply.text}"
                )
        else:
            verdicts.put(judge, left[index], reply)
            answered[left[index]] = reply.verdict
        if on_progress is not None:
            on_progress("judge", len(answered) + failed, len(questions))
    return answered, replayed, failed


def _comparison(
    pairs: Sequence[_Pair], answered: Mapping[str, Verdict], *, seed: int
) -> Comparison:
    preferences: list[float] = []
    judged: list[_Pair] = []
    disagreements, shown_first = 0, []
    for pair in pairs:
        if pair.questions is None:
            value = 0.5
        elif not all(question in answered for question in pair.questions):
            continue
        else:
            first, second = (answered[question] for question in pair.questions)
            for_ours = (_SCORE[first], 1 - _SCORE[second])
            shown_first += [_SCORE[first], _SCORE[second]]
            disagreements += for_ours[0] != for_ours[1]
            value = for_ours[0] if for_ours[0] == for_ours[1] else 0.5
        preferences.append(value)
        judged.append(pair)
    n = len(judged)
    prompts = [pair.index for pair in judged]
    differences = [pair.length_difference for pair in judged]
    plain = controlled = None
    if len(set(prompts)) >= 2:
        # All pairs weigh the same, also where a prompt has fewer of them: the ratio of sums by
        # prompt is the mean over pairs, and its interval still resamples prompts.
        wins = np.bincount(prompts, preferences).astype(float)
        counts = np.bincount(prompts).astype(float)
        plain = ratio_of_means(wins[counts > 0], counts[counts > 0], seed=seed)
        controlled = length_controlled_win_rate(
            preferences, differences, prompts=prompts, seed=seed
        )
    return Comparison(
        n=n,
        wins=preferences.count(1.0),
        ties=preferences.count(0.5),
        losses=preferences.count(0.0),
        win_rate=plain.mean if plain else sum(preferences) / n if n else None,
        ci95=plain.ci95 if plain else None,
        length_controlled_win_rate=controlled.mean if controlled else None,
        length_controlled_ci95=controlled.ci95 if controlled else None,
        identical=sum(pair.questions is None for pair in judged),
        order_disagreements=disagreements,
        first_chosen=sum(shown_first) / len(shown_first) if shown_first else None,
        mean_length_difference=sum(differences) / n if n else None,
        errors=len(pairs) - n,
    )


_SCORE: dict[Verdict, float] = {"A": 1.0, "B": 0.0, "tie": 0.5}


def _key(judge: Judge, question: str) -> str:
    return hashlib.sha256(f"{judge.identity}\0{question}".encode()).hexdigest()
