"""Answers sentence by sentence: candidates to go on with, of which the best and the worst are kept.

The search of CSR (Zhou et al. 2024, arXiv 2405.14622), with independent draws in the place of beams
of tokens, and without the diversity penalty that its code has in the scores. As in the paper, what
is kept is kept by the calibrated score; the code keeps by the self-reward alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from alignpro.config import SelfImproveConfig
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import target_tokens
from alignpro.models.seeds import derive_seed
from alignpro.rewards.check import COMPLETION_IDS, RESPONSE_LOGPROBS, score_checked
from alignpro.theory.optimum import optimum_weights
from alignpro.theory.self_reward import calibrated_scores
from alignpro.train.sentences import STOPS, sentence_end
from alignpro.types import Prompt, Reward, SamplingParams


@dataclass(frozen=True)
class Sentence:
    """A sentence that was drawn; ``ended``: the answer ends behind it. Without text, the end is all
    that was drawn."""

    written: str  # with the white space around it
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool

    @property
    def text(self) -> str:
        return self.written.strip()


@dataclass(frozen=True)
class Answer:
    """Whole sentences, with what each was worth among its siblings."""

    sentences: tuple[Sentence, ...] = ()
    scores: tuple[float, ...] = ()  # higher is better
    confidence: tuple[float, ...] = ()
    calibrator: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        return "".join(sentence.written for sentence in self.sentences).strip()

    @property
    def tokens(self) -> list[int]:
        return [token for sentence in self.sentences for token in sentence.tokens]

    @property
    def ended(self) -> bool:
        return bool(self.sentences) and self.sentences[-1].ended


@dataclass(frozen=True)
class Candidates:
    """What could stand at one place, scored: one of each text."""

    confidence: tuple[float, ...]
    calibrator: tuple[float, ...]
    scores: tuple[float, ...]

    def expected_gain(self, values: Sequence[float], beta: float) -> float:
        """By how much the mean of ``values`` rises at the optimum that pairs of these scores are
        for: the candidates tilted by exp(score / beta)."""
        weights = optimum_weights(self.scores, beta)
        return float((weights - 1 / len(weights)) @ np.asarray(values))


def score_candidates(
    logprobs: Sequence[Sequence[float]], calibrator: Sequence[float], config: SelfImproveConfig
) -> Candidates:
    """Of one place. logprobs: of each candidate's tokens."""
    raw = config.scale == "raw"  # the paper's self-reward is the probability itself
    own = [math.exp(math.fsum(row)) if raw else math.fsum(row) / len(row) for row in logprobs]
    scores = calibrated_scores(own, calibrator, config.calibration, config.scale)
    return Candidates(tuple(own), tuple(calibrator), tuple(scores.tolist()))


def path_score(answer: Answer, config: SelfImproveConfig) -> float:
    """Of a whole path: the mean over its sentences (the code), or the sum of the paper."""
    total = math.fsum(answer.scores)
    return total if config.scale == "raw" else total / max(1, len(answer.scores))


def search_answers(
    model: NativeModel,
    adapter: Any,
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
    calibrator: Reward,
    config: SelfImproveConfig,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[list[Answer]], list[Candidates]]:
    """Finished answers of every prompt, the best first, and all places that were scored.

    An answer is finished where the model ended it, after ``config.sentences``, or where no whole
    sentence fits behind it. Draws are keyed by (seed, prompt, depth, place).
    """
    read = [target_tokens(model.tokenizer, prompt) for prompt in prompts]
    finished: list[list[Answer]] = [[] for _ in prompts]
    frontier = [(index, Answer()) for index in range(len(prompts))]
    places: list[Candidates] = []
    for depth in range(config.sentences):
        on_progress(depth, config.sentences)
        ranks = _rank_in_prompt([index for index, _ in frontier])
        requests = [
            _Request(
                tokens=[*read[index], *answer.tokens],
                params=replace(
                    config.response,
                    max_new_tokens=config.response.max_new_tokens - len(answer.tokens),
                    seed=derive_seed(seed, index, depth, rank),
                ),
                sample=sample,
            )
            for (index, answer), rank in zip(frontier, ranks, strict=True)
            for sample in range(config.candidates)
        ]
        drawn = next_sentences(model, adapter, requests)
        groups: list[tuple[int, Answer, list[Sentence]]] = []
        for place, (index, answer) in enumerate(frontier):
            found = drawn[place * config.candidates : (place + 1) * config.candidates]
            sentences = {s.text: s for s in found if s is not None and s.text}
            if any(s is not None and not s.text for s in found) or len(sentences) < 2:
                finished[index] += [answer] if answer.sentences else []
            if len(sentences) >= 2:
                groups.append((index, answer, list(sentences.values())))
        grown = _scored(groups, prompts, columns, calibrator, config, places)
        frontier = []
        for index in range(len(prompts)):
            mine = [answer for owner, answer in grown if owner == index]
            finished[index] += [answer for answer in mine if answer.ended]
            going_on = [answer for answer in mine if not answer.ended]
            going_on.sort(key=lambda answer: -path_score(answer, config))
            best, worst = config.keep
            kept = going_on[:best] + going_on[best:][-worst:]
            frontier += [(index, answer) for answer in kept]
    for index, answer in frontier:
        finished[index].append(answer)
    on_progress(config.sentences, config.sentences)
    for answers in finished:
        answers.sort(key=lambda answer: -path_score(answer, config))
    return finished, places


def _rank_in_prompt(owners: Sequence[int]) -> list[int]:
    """The number of each among those of its owner, so that a prompt's draws do not depend on
    another's."""
    seen: dict[int, int] = {}
    numbers = []
    for owner in owners:
        seen[owner] = seen.get(owner, -1) + 1
        numbers.append(seen[owner])
    return numbers


def _scored(
    groups: Sequence[tuple[int, Answer, list[Sentence]]],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
    calibrator: Reward,
    config: SelfImproveConfig,
    places: list[Candidates],
) -> list[tuple[int, Answer]]:
    """(prompt, answer with one more sentence); the places are added to ``places``."""
    rows = [(index, sentence) for index, _, group in groups for sentence in group]
    of_rows = {name: [values[index] for index, _ in rows] for name, values in columns.items()}
    own: dict[str, Sequence[Any]] = {
        COMPLETION_IDS: [list(sentence.tokens) for _, sentence in rows],
        RESPONSE_LOGPROBS: [list(sentence.logprobs) for _, sentence in rows],
    }
    given = score_checked(
        calibrator,
        [prompts[index] for index, _ in rows],
        [""] * len(rows),
        [sentence.text for _, sentence in rows],
        of_rows | own,
    )
    grown, at = [], 0
    for index, answer, group in groups:
        scores = given[at : at + len(group)]
        at += len(group)
        known = [not math.isnan(score) for score in scores]  # None is no score
        group, scores = list(compress(group, known)), list(compress(scores, known))
        if len(group) < 2:
            continue
        place = score_candidates([s.logprobs for s in group], scores, config)
        places.append(place)
        for number, sentence in enumerate(group):
            more = Answer(
                (*answer.sentences, sentence),
                (*answer.scores, place.scores[number]),
                (*answer.confidence, place.confidence[number]),
                (*answer.calibrator, place.calibrator[number]),
            )
            grown.append((index, more))
    return grown


# --- one sentence ---


@dataclass(frozen=True)
class _Request:
    tokens: list[int]  # the prompt, and the answer so far
    params: SamplingParams
    sample: int


def next_sentences(
    model: NativeModel, adapter: Any, requests: Sequence[_Request]
) -> list[Sentence | None]:
    """The sentence that each request is answered with; None where no whole one fits.

    A stop at what looks like an end, and is none (1. Jan, e.g. this), goes on where it stopped:
    draws are keyed by the position, so they are those of one that did not stop.
    """
    prepared = model.make_adapter(adapter)
    tokens: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    found: list[Sentence | None] = [None for _ in requests]
    under_way = [i for i, r in enumerate(requests) if r.params.max_new_tokens >= 1]
    while under_way:
        with model.client() as client:
            handles = [
                client.submit(
                    [*requests[i].tokens, *tokens[i]],
                    replace(
                        requests[i].params,
                        max_new_tokens=requests[i].params.max_new_tokens - len(tokens[i]),
                        stop=STOPS,
                    ),
                    adapter=prepared,
                    sample=requests[i].sample,
                )
                for i in under_way
            ]
            client.run()
        going_on = []
        for i, handle in zip(under_way, handles, strict=True):
            completion = handle.completion()
            tokens[i] += completion.tokens
            logprobs[i] += completion.logprobs
            found[i] = _whole_sentence(model, tokens[i], logprobs[i])
            left = requests[i].params.max_new_tokens - len(tokens[i])
            if found[i] is None and completion.finish_reason == "stop" and left > 0:
                going_on.append(i)
        under_way = going_on
    return found


def _whole_sentence(
    model: NativeModel, tokens: Sequence[int], logprobs: Sequence[float]
) -> Sentence | None:
    """The first sentence of what was drawn, with the tokens that it takes."""
    tokenizer = model.tokenizer
    ended = bool(tokens) and tokens[-1] in tokenizer.eos_ids
    body = list(tokens[:-1] if ended else tokens)
    text = tokenizer.join_bytes(body).decode("utf-8", "replace")
    end = sentence_end(text)
    if end is None or not text[end:].strip():
        if not ended and end is None:
            return None
        return Sentence(text, tuple(tokens), tuple(logprobs), ended)
    size, count, covered = len(text[:end].encode("utf-8")), 0, 0
    while covered < size and count < len(body):
        covered += len(tokenizer.join_bytes([body[count]]))
        count += 1
    written = tokenizer.join_bytes(body[:count]).decode("utf-8", "replace")
    return Sentence(written, tuple(tokens[:count]), tuple(logprobs[:count]), False)
