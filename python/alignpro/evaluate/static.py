"""The best fixed instruction: the honest rival of a prompter, found as a search tool would.

It is chosen on training prompts alone, by successive halving: in every round all candidates left
answer the same prompts under the same random draws, the better half goes on, and each round spends
the same number of responses, so that fewer candidates are judged on more prompts (Karnin, Koren and
Somekh 2013; Jamieson and Talwalkar 2016, arXiv 1502.07943).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from alignpro.config import EvalConfig, StaticSearch
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import Candidate, SearchResult, SearchRound
from alignpro.models.adapter import LoraWeights
from alignpro.pipeline import Pipeline, derive_seed
from alignpro.types import Rewrite

SEARCH_STREAM = 3  # of randomness, beside the pipeline's
_SHOWN = 5  # candidates of a round in the report


@dataclass(frozen=True)
class SearchData:
    """What a search is made of, as far as it is there before a model is."""

    rows: list[PromptRow]
    instructions: list[str]


@dataclass(frozen=True)
class StaticInstruction:
    text: str
    search: SearchResult | None = None  # None: it was given


@dataclass
class _Candidate:
    text: str
    source: str
    total: float = 0.0  # sum of rewards
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else -math.inf  # none was answered

    @property
    def entry(self) -> Candidate:
        return Candidate(self.text, self.source, self.mean, self.count)


def in_append_form(pipeline: Pipeline) -> Pipeline:
    """The pipeline as a fixed instruction needs it: behind the prompt, never instead of it."""
    other = copy.copy(pipeline)
    other.prompting = replace(pipeline.prompting, mode="append")
    return other


def load_search(
    search: StaticSearch, config: EvalConfig, held_out: Sequence[PromptRow], num_prompters: int
) -> SearchData:
    """The training prompts and the instructions that are given.

    Raises:
        ValueError: a training prompt that is held out as well, or a budget too small for one
            response to every candidate in every round.
    """
    source = search.data or config.data
    rows = load_prompts(source, split=search.split)
    shared = {row.prompt for row in rows} & {row.prompt for row in held_out}
    if shared:
        raise ValueError(
            f"static: {len(shared)} of the {len(rows)} prompts to search on ({source}, split "
            f"{search.split}) are held out as well; set static.data or static.split to others"
        )
    instructions = [text.strip() for text in search.candidates]
    if search.instructions is not None:
        found = load_prompts(search.instructions, column="instruction")
        instructions += [row.prompt.strip() for row in found]
    instructions = list(dict.fromkeys(instructions))
    written = search.num_written * num_prompters if config.prompting.mode == "append" else 0
    most = len(instructions) + min(written, len(rows) * num_prompters)
    if most == 0:
        raise ValueError(
            "static: no candidates: in rewrite mode a prompter writes no instructions; set "
            "static.instructions or static.candidates"
        )
    needed = most * _num_rounds(most)
    if search.budget < needed:
        raise ValueError(
            f"static.budget: expected at least {needed} responses for up to {most} candidates in "
            f"{_num_rounds(most)} rounds, got {search.budget}"
        )
    return SearchData(rows, instructions)


def search_static(
    pipeline: Pipeline,
    search: StaticSearch,
    data: SearchData,
    prompters: Mapping[str, LoraWeights | None],
    *,
    seed: int,
    on_progress: OnProgress | None = None,
) -> StaticInstruction:
    """The winner of successive halving over ``data`` and what the prompters write for its prompts.

    A survivor keeps the rewards of earlier rounds. The winner's mean on the training prompts is
    the best of many noisy means, hence too high; only the held-out arm says what it is worth.
    """
    candidates = _candidates(pipeline, search, data, prompters, seed)
    pipeline = in_append_form(pipeline)
    prompts, columns = [row.prompt for row in data.rows], stack_columns(data.rows)
    plan = _plan(len(candidates), len(prompts), search.budget)
    total = sum(count * num_prompts * each for count, num_prompts, each in plan)
    done, cursor = 0, 0
    rounds: list[SearchRound] = []
    left = candidates
    for number, (count, num_prompts, each) in enumerate(plan):
        assert count == len(left)
        chosen = [(cursor + i) % len(prompts) for i in range(num_prompts)]
        cursor += num_prompts
        rollout = pipeline.answer(
            [prompts[i] for i in chosen],
            [[candidate.text for candidate in left]] * num_prompts,
            num_responses=each,
            seed=derive_seed(seed, SEARCH_STREAM, 1 + number),
            columns={name: [values[i] for i in chosen] for name, values in columns.items()},
            common_draws=True,
            on_progress=watch(on_progress, "static search", total, done),
        )
        _credit(left, rollout.rewrites)
        done += count * num_prompts * each
        ranked = sorted(left, key=lambda candidate: -candidate.mean)  # stable: ties keep order
        rounds.append(
            SearchRound(count, num_prompts, num_prompts * each, [c.entry for c in ranked[:_SHOWN]])
        )
        left = ranked[: (count + 1) // 2]
    history = SearchResult(
        instruction=left[0].text,
        source=left[0].source,
        candidates=len(candidates),
        train_prompts=len(prompts),
        budget=search.budget,
        responses=done,
        rounds=rounds,
    )
    return StaticInstruction(left[0].text, history)


def _candidates(
    pipeline: Pipeline,
    search: StaticSearch,
    data: SearchData,
    prompters: Mapping[str, LoraWeights | None],
    seed: int,
) -> list[_Candidate]:
    """Distinct instructions, in a fixed order: those that are given first."""
    sources = dict.fromkeys(data.instructions, "given")
    if pipeline.prompting.mode == "append" and search.num_written:
        prompts = [row.prompt for row in data.rows[: search.num_written]]
        for name, adapter in prompters.items():
            key = derive_seed(seed, SEARCH_STREAM, 0)
            for group in pipeline.with_adapter(adapter).rewrite(prompts, seed=key):
                if group[0].text:
                    sources.setdefault(group[0].text, name)
    if not sources:
        raise ValueError("static: the prompters wrote nothing but empty rewrites to choose from")
    return [_Candidate(text, source) for text, source in sources.items()]


def _num_rounds(candidates: int) -> int:
    return (candidates - 1).bit_length()  # halvings, rounded up, until one is left


def _plan(candidates: int, prompts: int, budget: int) -> list[tuple[int, int, int]]:
    """(candidates, prompts, responses to each prompt) of every round."""
    plan = []
    left, rounds = candidates, _num_rounds(candidates)
    for _ in range(rounds):
        each = budget // (rounds * left)
        num_prompts = min(each, prompts)
        plan.append((left, num_prompts, each // num_prompts))
        left = (left + 1) // 2
    return plan


def _credit(candidates: Sequence[_Candidate], groups: Sequence[Sequence[Rewrite]]) -> None:
    for group in groups:
        for candidate, rewrite in zip(candidates, group, strict=True):
            candidate.total += sum(response.reward for response in rewrite.responses)
            candidate.count += len(rewrite.responses)
