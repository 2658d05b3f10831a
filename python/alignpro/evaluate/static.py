"""The best fixed instruction: the honest rival of a prompter, found as a search tool would.

It is chosen on training prompts alone, by successive halving: in every round all candidates left
answer the same prompts under the same random draws, the better half goes on, and each round spends
the same number of responses, so that fewer candidates are judged on more prompts (Karnin, Koren and
Somekh 2013; Jamieson and Talwalkar 2016, arXiv 1502.07943).
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from alignpro.config import EvalConfig, StaticSearch
from alignpro.data.load import PromptRow, load_instructions, load_prompts, stack_columns
from alignpro.evaluate.progress import OnProgress
from alignpro.evaluate.results import Candidate, SearchResult, SearchRound
from alignpro.models.adapter import AdapterWeights
from alignpro.models.mixture import Mixture
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline

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
    search: StaticSearch,
    config: EvalConfig,
    held_out: Sequence[PromptRow],
    prompters: Sequence[str],
) -> SearchData:
    """The training prompts, shuffled since files come sorted by kind and early rounds see only a
    few of them, and the instructions that are given. prompters: those of the evaluation.

    Raises:
        ValueError: a training prompt that is held out as well, or a budget too small for one
            response to every candidate in every round.
    """
    source = search.data.of(config.data)
    rows = load_prompts(source)
    random.Random(config.seed).shuffle(rows)
    shared = {row.prompt for row in rows} & {row.prompt for row in held_out}
    if shared:
        raise ValueError(
            f"static: {len(shared)} of the {len(rows)} prompts to search on ({source.path}, "
            f"split {source.split}) are held out as well; set static.data to others"
        )
    instructions = [text.strip() for text in search.candidates]
    if search.instructions is not None:
        instructions += load_instructions(search.instructions)
    instructions = list(dict.fromkeys(instructions))
    writers = len(set(prompters) & set(search.writers))
    written = search.num_written * writers if config.prompting.mode == "append" else 0
    most = len(instructions) + min(written, len(rows) * writers)
    if most == 0:
        raise ValueError(
            "static: no candidates: set static.instructions or static.candidates (in rewrite mode, "
            "or without static.writers, a prompter writes no instructions)"
        )
    if search.budget_tokens is None:
        stages = [most, _num_joined(search, most)] if search.joined else [most]
        needed = len(stages) * max(count * _num_rounds(count) for count in stages)
        if search.budget < needed:
            raise ValueError(
                f"static.budget: expected at least {needed} responses for up to {most} candidates "
                f"in {_num_rounds(most)} rounds, got {search.budget}"
            )
    return SearchData(rows, instructions)


def search_static(
    pipeline: Pipeline,
    search: StaticSearch,
    data: SearchData,
    prompters: Mapping[str, AdapterWeights | Mixture | None],
    *,
    seed: int,
    on_progress: OnProgress | None = None,
) -> StaticInstruction:
    """The winner of successive halving over ``data`` and what the prompters write for its prompts.

    A survivor keeps the rewards of earlier rounds. The winner's mean on the training prompts is
    the best of many noisy means, hence too high; only the held-out arm says what it is worth.
    """
    assert search.budget_tokens != "auto"  # resolved before
    budget = search.budget_tokens or search.budget
    texts = _candidates(pipeline, search, data, prompters, seed)
    halving = _Halving(
        in_append_form(pipeline),
        data.rows,
        budget,
        None if search.budget_tokens is None else float(pipeline.response_params.max_new_tokens),
        seed,
        on_progress,
    )
    best = halving.run(texts, budget / 2 if search.joined else budget)
    if search.joined:
        chosen = best[: search.joined]
        pairs = [f"{a.text} {b.text}" for a, b in itertools.permutations(chosen, 2)]
        sources = {one.text: one.source for one in chosen} | dict.fromkeys(pairs, "joined")
        best = halving.run(sources, budget - halving.spent)
    if on_progress is not None:
        on_progress("static search", budget, budget)
    history = SearchResult(
        instruction=best[0].text,
        source=best[0].source,
        candidates=len(texts),
        train_prompts=len(data.rows),
        budget=budget,
        responses=halving.responses,
        rounds=halving.rounds,
        tokens=halving.tokens,
    )
    return StaticInstruction(best[0].text, history)


class _Halving:
    """Successive halving within a budget of responses, or of tokens: then a response's length is
    first taken to be the longest and later what it was on average so far."""

    def __init__(
        self,
        pipeline: Pipeline,
        rows: Sequence[PromptRow],
        budget: int,
        longest: float | None,
        seed: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.responses = self.tokens = 0
        self.rounds: list[SearchRound] = []
        self._pipeline, self._seed, self._on_progress = pipeline, seed, on_progress
        self._prompts, self._columns = [row.prompt for row in rows], stack_columns(rows)
        self._budget, self._longest = budget, longest
        self._cursor = self._batches = 0

    @property
    def spent(self) -> int:
        return self.responses if self._longest is None else self.tokens

    def run(self, sources: Mapping[str, str], budget: float) -> list[_Candidate]:
        """Candidates (text to source) from the best to the first that left. A survivor keeps the
        rewards of earlier rounds; a round takes an equal share of what is left of the budget."""
        left = [_Candidate(text, source) for text, source in sources.items()]
        gone: list[_Candidate] = []
        until = self.spent + budget
        while len(left) > 1:
            share = (until - self.spent) / _num_rounds(len(left))
            seen = self._round(left, self.spent + share)
            ranked = sorted(left, key=lambda candidate: -candidate.mean)  # stable: ties keep order
            best = [candidate.entry for candidate in ranked[:_SHOWN]]
            self.rounds.append(SearchRound(len(left), *seen, best))
            half = (len(left) + 1) // 2
            left, gone = ranked[:half], ranked[half:] + gone
        return left + gone

    def _round(self, left: Sequence[_Candidate], until: float) -> tuple[int, int]:
        """All of ``left`` answer the same prompts; (prompts, responses of each candidate)."""
        seen, each = set[int](), 0
        while not each or until - self.spent >= len(left) * self._price:
            affordable = max(1, int((until - self.spent) / (len(left) * self._price)))
            num_prompts = min(affordable, len(self._prompts))
            num_responses = affordable // num_prompts
            chosen = [(self._cursor + i) % len(self._prompts) for i in range(num_prompts)]
            self._cursor += num_prompts
            self._answer(left, chosen, num_responses)
            seen.update(chosen)
            each += num_prompts * num_responses
        return len(seen), each

    def _answer(self, left: Sequence[_Candidate], chosen: Sequence[int], responses: int) -> None:
        self._batches += 1
        spent, price = self.spent, self._price

        def show(done: int) -> None:
            assert self._on_progress is not None
            now = min(self._budget, round(spent + done * price))
            self._on_progress("static search", now, self._budget)

        rollout = self._pipeline.answer(
            [self._prompts[i] for i in chosen],
            [[candidate.text for candidate in left]] * len(chosen),
            num_responses=responses,
            seed=derive_seed(self._seed, SEARCH_STREAM, self._batches),
            columns={name: [values[i] for i in chosen] for name, values in self._columns.items()},
            common_draws=True,
            on_progress=None if self._on_progress is None else show,
        )
        for group in rollout.rewrites:
            for candidate, rewrite in zip(left, group, strict=True):
                candidate.total += sum(response.reward for response in rewrite.responses)
                candidate.count += len(rewrite.responses)
        self.responses += len(left) * len(chosen) * responses
        self.tokens += rollout.generated_tokens

    @property
    def _price(self) -> float:
        """Of a response."""
        if self._longest is None:
            return 1.0
        return self.tokens / self.responses if self.responses else self._longest


def _candidates(
    pipeline: Pipeline,
    search: StaticSearch,
    data: SearchData,
    prompters: Mapping[str, AdapterWeights | Mixture | None],
    seed: int,
) -> dict[str, str]:
    """Distinct instructions and their sources, in a fixed order: those that are given first."""
    sources = dict.fromkeys(data.instructions, "given")
    if pipeline.prompting.mode == "append" and search.num_written:
        prompts = [row.prompt for row in data.rows[: search.num_written]]
        for name, adapter in prompters.items():
            if name not in search.writers:
                continue
            key = derive_seed(seed, SEARCH_STREAM, 0)
            for group in pipeline.with_adapter(adapter).rewrite(prompts, seed=key):
                if group[0].text:
                    sources.setdefault(group[0].text, name)
    if not sources:
        raise ValueError("static: the prompters wrote nothing but empty rewrites to choose from")
    return sources


def _num_rounds(candidates: int) -> int:
    return (candidates - 1).bit_length()  # halvings, rounded up, until one is left


def _num_joined(search: StaticSearch, candidates: int) -> int:
    """The best of so many candidates, and all their pairs."""
    best = min(search.joined, candidates)
    return best + best * (best - 1)
