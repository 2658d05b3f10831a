"""Rounds of self-improvement: candidates, pairs, preference training, and what came of it.

A run directory holds config.json, reference/ (the adapter of the first policy, if any), of every
round pairs-NN.jsonl, round-NN/ (a run of `alignpro prefer`) and measured-NN.jsonl, rounds.jsonl
with a row a round, and at the end adapter/. Round 0 is the first policy. Everything drawn is keyed
by (seed, round, ...), and each file is written whole: a run that was stopped goes on at the step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import fingerprints
from alignpro.config import (
    PairsFitConfig,
    PreferConfig,
    SelfImproveConfig,
    to_mapping,
)
from alignpro.config.data import PreferencesConfig
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.files import write_json, write_json_lines
from alignpro.interrupts import interruptible
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import LoraWeights, require_lora
from alignpro.models.answer_scores import TargetScorer
from alignpro.models.language_model import ChatModel
from alignpro.models.native_model import NativeModel
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.rewards.grounding import GroundingReward
from alignpro.rewards.scenes import ChairReward
from alignpro.run_directory import (
    CONFIG,
    RunDirectory,
    is_free,
    is_run_dir,
    open_run_dir,
    read_record,
)
from alignpro.theory.self_reward import calibrator_decides, effective_beta, sharpening
from alignpro.train.callbacks import OnProgress
from alignpro.train.checkpoint import MAY_CHANGE, begin_run, check_same_run
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy, Reference, save_trained
from alignpro.train.run import OnStep, checked_run, load_roles, run_prefer, starting_weights
from alignpro.train.self_measure import (
    MeasuredAnswer,
    measure_policy,
    measured_of_plain,
    round_warnings,
    summarise,
)
from alignpro.train.sentence_search import (
    Candidates,
    path_score,
    score_candidates,
    search_answers,
)
from alignpro.types import Conversation, Prompt, Reward

ROUNDS = "rounds.jsonl"
_PAIRS, _MEASURED, _FIT = 1 << 34, 1 << 35, 1 << 36  # streams of randomness
_RAW_RATIO = 10.0  # how many times further one term may spread than the other
_log = logging.getLogger(__name__)
OnRound = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class SelfMadePair:
    """The best and the worst that was found for a prompt."""

    prompt: Prompt
    chosen: str
    rejected: str
    score: tuple[float, float]  # of chosen and rejected, as the next two
    confidence: tuple[float, float]
    calibrator: tuple[float, float]

    def to_plain(self) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": Conversation.of(self.prompt).plain}
        row |= {"chosen": self.chosen, "rejected": self.rejected}
        for name in ("score", "confidence", "calibrator"):
            row[f"chosen_{name}"], row[f"rejected_{name}"] = getattr(self, name)
        return row


def run_self_improve(
    config: SelfImproveConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
    on_round: OnRound | None = None,
) -> list[dict[str, Any]]:
    """Improve a policy by pairs of its own answers; returns the rows of rounds.jsonl.

    Args:
        resume, overwrite, allow_changes: as of `run_prefer`.
        on_step: told of the steps of each round's training; on_progress: of candidates as they
            come; on_round: of the row of each round, that of the first policy before the others.

    Raises:
        ValueError, OSError, ImportError: bad input, before a model is loaded or while it is; a
            calibrator, or a confidence, that the target cannot be asked for; a round without pairs.
    """
    config, run_dir = checked_run(config, SelfImproveConfig, resume=resume, overwrite=overwrite)
    rows = load_prompts(config.data)[: config.num_prompts]
    measured = rows
    if config.measured.data is not None:
        measured = load_prompts(config.measured.data.of(config.data))
    measured = measured[: config.measured.num_prompts]
    calibrator = build_reward(config.calibrator)
    check_columns(calibrator, stack_columns(rows))
    prompter, target = load_roles(config)
    first = starting_weights(config, prompter, run_dir if resume else None)
    start = None if first is None else require_lora(first, f"{config.policy}.adapter")
    improvement = SelfImprovement(config, prompter, target, calibrator, rows, measured, start)
    directory = open_run_dir(config.run_dir, resume=resume, overwrite=overwrite)

    def restore(same: Mapping[str, str]) -> int:
        free = (MAY_CHANGE - {"steps", "checkpoint_every"}) | {"iterations"}
        check_same_run(read_record(run_dir / CONFIG), to_mapping(config), same, free=free)
        return 0

    begin_run(
        *(run_dir, to_mapping(config), improvement.made_from(), start),
        restore if resume else None,
        allow_changes=allow_changes,
    )
    with interruptible(), directory:
        return improvement.run(
            directory,
            allow_changes=allow_changes,
            on_step=on_step,
            on_progress=on_progress,
            on_round=on_round,
        )


class SelfImprovement:
    """The rounds of a run over loaded parts. ``start``: the adapter of the first policy; None: the
    model without one. Raises ValueError as `run_self_improve`."""

    def __init__(
        self,
        config: SelfImproveConfig,
        prompter: NativeModel,
        target: NativeModel | ChatModel,
        calibrator: Reward,
        rows: Sequence[PromptRow],
        measured: Sequence[PromptRow],
        start: LoraWeights | None,
    ) -> None:
        scorer = TargetScorer(target)
        if not scorer.tells_logprobs:
            raise ValueError(
                f"target: {target.name} tells no log-probabilities of what it writes, and they are "
                "the confidence; target.client.logprobs=true asks an endpoint for them"
            )
        self.config, self._start, self._calibrator = config, start, calibrator
        self._model, self._target = prompter, target
        self._pipeline = Pipeline.configured(config, prompter, target, calibrator)
        if config.policy == "prompter":
            self._pipeline = self._pipeline.with_adapter(start)
        # Of a target that scores no texts, the words that it shares with its source.
        self._grounding = GroundingReward("likelihood" if scorer.scores_answers else "words")
        self._grounding.use_scorer(scorer)
        rewrites = config.policy == "prompter"
        unread = unread_by(self._pipeline, rewrites=rewrites)
        rows = fit_rows(rows, unread, config.on_too_long).rows
        unread = unread_by(
            self._pipeline.without_reward(), rewrites=rewrites, scored_by=[self._grounding]
        )
        measured = fit_rows(measured, unread, config.on_too_long).rows
        self._prompts, self._columns = [row.prompt for row in rows], stack_columns(rows)
        if len(measured) < 2:
            raise ValueError(
                f"measured: expected 2 or more prompts, for an interval, got {len(measured)}"
            )
        self._measured = [row.prompt for row in measured]
        self._measured_columns = stack_columns(measured)
        check_columns(self._grounding, self._measured_columns)
        if "objects" in self._measured_columns:  # which are counted
            check_columns(ChairReward(), self._measured_columns)

    def made_from(self) -> fingerprints.Fingerprints:
        """What the run is made from."""
        mine = self.config.policy == "target"
        found = fingerprints.of_models(None if mine else self._model, self._target)
        found |= fingerprints.of_reward(self._calibrator)
        name = str(self.config.data.path)
        found["data"] = fingerprints.of_rows(name, self._prompts, self._columns)
        found["measured data"] = fingerprints.of_rows("", self._measured, self._measured_columns)
        if self._start is not None:
            found["adapter that training began with"] = fingerprints.of_adapter(self._start)
        return found

    def run(
        self,
        directory: RunDirectory,
        *,
        allow_changes: bool = False,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        on_round: OnRound | None = None,
    ) -> list[dict[str, Any]]:
        """Go on with what the directory holds, do the rounds that are left, and write adapter/."""
        self._dir, self._on_progress = directory.path, on_progress
        log = directory.path / ROUNDS
        done = read_metrics(log) if log.exists() else []
        done = done[: self.config.iterations + 1]
        if on_round is not None:
            for row in done:
                on_round(row)
        try:
            for number in range(len(done), self.config.iterations + 1):
                made = self._round(number, allow_changes, on_step)
                if made is None:
                    break
                done.append(made)
                write_json_lines(log, done)
                if on_round is not None:
                    on_round(made)
            last = len(done) - 1
            policy = LoraPolicy(self._model, self._trained(last))
            save_trained(directory.path / "adapter", policy, self._fit_config(last))
        except KeyboardInterrupt as interrupt:
            goes_on = f"alignpro self-improve {directory.path / CONFIG} --resume"
            interrupt.args = (f"in round {len(done)}; go on with: {goes_on}",)
            raise
        return done

    # --- one round ---

    def _round(
        self, number: int, allow_changes: bool, on_step: OnStep | None
    ) -> dict[str, Any] | None:
        """Candidates, pairs and training of a round, and its measures; of round 0 these alone.
        None: a later round without pairs."""
        config, seconds = self.config, dict[str, float]()
        row: dict[str, Any] = {"round": number}
        if number:
            started = time.perf_counter()
            row["search"] = self._pairs(number)
            if row["search"] is None:
                return None
            seconds["candidates"] = time.perf_counter() - started
            started = time.perf_counter()
            self._fit(number, allow_changes, on_step)
            steps = read_metrics(self._round_dir(number) / "metrics.jsonl")
            row["training"] = {
                name: [steps[0][name], steps[-1][name]] for name in ("loss", "accuracy", "margin")
            }
            seconds["training"] = time.perf_counter() - started
            beta, share = config.preference.beta, config.calibration
            row["beta_to_first"] = effective_beta(beta, number, config.reference)
            row["sharpening"] = sharpening(share, beta, number, config.reference)
        started = time.perf_counter()
        answers = self._measure(number)
        first = answers if number == 0 else self._measured_answers(0)
        row["measured"] = summarise(answers, first, len(self._measured), config.seed)
        seconds["measure"] = time.perf_counter() - started
        warnings = round_warnings(row["measured"])
        ratio = row.get("search", {}).get("spread_ratio")
        if config.scale == "raw" and ratio is not None and not 1 / _RAW_RATIO < ratio < _RAW_RATIO:
            warnings["raw"] = (
                "scale: raw adds up what is not on one scale: among candidates the calibrator's "
                f"part of the score spreads {ratio:.3g} times as far as the confidence's, so that "
                "one of them decides alone; rank or z make them comparable."
            )
        for text in warnings.values():
            _log.warning("round %d: %s", number, text)
        return {**row, "warnings": warnings, "seconds": seconds}

    def _weights(self, number: int) -> LoraWeights | None:
        """The policy after so many rounds."""
        return self._start if number == 0 else self._trained(number)

    def _trained(self, number: int) -> LoraWeights:
        folder = self._round_dir(number) / "adapter"
        return require_lora(self._model.load_adapter(folder), str(folder))

    def _round_dir(self, number: int) -> Path:
        return self._dir / f"round-{number:02d}"

    def _pairs_file(self, number: int) -> Path:
        return self._dir / f"pairs-{number:02d}.jsonl"

    def _pairs(self, number: int) -> dict[str, Any] | None:
        """Write the pairs of a round, unless they are there; what is known of its candidates.
        None: a later round has no pairs, which ends the run."""
        config, path = self.config, self._pairs_file(number)
        beside = path.with_suffix(".json")
        if not (path.exists() and beside.exists()):
            adapter = self._weights(number - 1)
            seed = derive_seed(config.seed, _PAIRS, number)
            make = self._of_answers if config.policy == "target" else self._of_rewrites
            pairs, places = make(adapter, seed)
            if not pairs:
                none = (
                    f"round {number}: no pairs, since no prompt has two candidates that differ and "
                    "have scores"
                )
                more = (
                    "more candidates, a higher temperature, or more max_new_tokens, where they end "
                    "within a sentence, make some"
                )
                if number == 1:
                    raise ValueError(f"{none}; {more}")
                _log.warning("%s: the run ends with round %d; %s", none, number - 1, more)
                return None
            write_json_lines(path, (pair.to_plain() for pair in pairs))
            write_json(beside, _search_row(pairs, places, config))
        return read_record(beside)

    def _of_answers(
        self, adapter: LoraWeights | None, seed: int
    ) -> tuple[list[SelfMadePair], list[Candidates]]:
        found, places = search_answers(
            *(self._model, adapter, self._prompts, self._columns, self._calibrator, self.config),
            seed=seed,
            on_progress=self._told("candidates"),
        )
        pairs = []
        for prompt, answers in zip(self._prompts, found, strict=True):
            if len(answers) < 2 or answers[0].text == answers[-1].text:
                continue
            best, worst = answers[0], answers[-1]
            pairs.append(
                SelfMadePair(
                    prompt,
                    best.text,
                    worst.text,
                    (path_score(best, self.config), path_score(worst, self.config)),
                    (_mean(best.confidence), _mean(worst.confidence)),
                    (_mean(best.calibrator), _mean(worst.calibrator)),
                )
            )
        return pairs, places

    def _of_rewrites(
        self, adapter: LoraWeights | None, seed: int
    ) -> tuple[list[SelfMadePair], list[Candidates]]:
        """Rewrites, each by the confidence of the target in its answer to it, and by what the
        calibrator says of that answer to the original prompt."""
        told = self._told("candidates")
        wanted = 2 * len(self._prompts) * self.config.candidates
        rollout = self._pipeline.with_adapter(adapter).rollout(
            self._prompts,
            num_rewrites=self.config.candidates,
            seed=seed,
            columns=self._columns,
            on_progress=lambda done: told(min(done, wanted), wanted),
        )
        pairs, places = [], []
        for prompt, group in zip(self._prompts, rollout.rewrites, strict=True):
            # Of an answer without a token there is no confidence.
            answered = {w.text: w for w in group if w.text and any(r.logprobs for r in w.responses)}
            if len(answered) < 2:
                continue
            texts = list(answered)
            responses = [answered[text].responses[0] for text in texts]
            place = score_candidates(
                [r.logprobs for r in responses], [r.reward for r in responses], self.config
            )
            places.append(place)
            order = sorted(range(len(texts)), key=lambda i: -place.scores[i])
            best, worst = order[0], order[-1]
            numbers = [
                (values[best], values[worst])
                for values in (place.scores, place.confidence, place.calibrator)
            ]
            pairs.append(SelfMadePair(prompt, texts[best], texts[worst], *numbers))
        return pairs, places

    def _fit(self, number: int, allow_changes: bool, on_step: OnStep | None) -> None:
        """Train on the pairs of a round, or go on with it, by the preference training."""
        folder = self._round_dir(number)
        begun = folder.is_dir() and is_run_dir(folder) and not is_free(folder)
        first: Reference = self._start if self._start is not None else "base"
        run_prefer(
            self._fit_config(number),
            resume=begun and (folder / CONFIG).is_file(),
            allow_changes=allow_changes,
            on_step=on_step,
            model=self._model,
            reference=first if self.config.reference == "first" else None,
        )

    def _fit_config(self, number: int) -> PreferConfig:
        config, role = self.config, self.config.policy
        before = self._round_dir(number - 1) / "adapter"
        start = config.trained.adapter if number == 1 else str(before)
        if number == 1 and self._start is not None:
            start = str(self._dir / "reference")
        common = {f.name: getattr(config, f.name) for f in fields(PairsFitConfig)}
        common |= {"prompter": config.prompter, "target": config.target}
        common[role] = replace(config.trained, adapter=start)
        common["seed"] = derive_seed(config.seed, _FIT, number)
        pairs = read_record(self._pairs_file(number).with_suffix(".json"))["pairs"]
        common["batch_size"] = min(config.batch_size, pairs)
        steps_of_epochs = -(-config.epochs * pairs // common["batch_size"])
        common["steps"] = min(config.steps, steps_of_epochs)
        return PreferConfig(
            **common,
            policy=role,
            data=PreferencesConfig(str(self._pairs_file(number)), split=None),
            run_dir=str(self._round_dir(number)),
            prompting=config.prompting,
            **vars(config.preference),
        )

    def _measure(self, number: int) -> list[MeasuredAnswer]:
        """The policy's answers after so many rounds; they are kept."""
        path = self._dir / f"measured-{number:02d}.jsonl"
        if not path.exists():
            answers = measure_policy(
                *(self._pipeline, self._model, self.config),
                *(self._measured, self._measured_columns),
                adapter=self._weights(number),
                previous=self._weights(max(0, number - 1)),
                first=self._start,
                grounding=self._grounding,
                seed=derive_seed(self.config.seed, _MEASURED),
            )
            write_json_lines(path, (answer.to_plain() for answer in answers))
        return self._measured_answers(number)

    def _measured_answers(self, number: int) -> list[MeasuredAnswer]:
        return [
            measured_of_plain(r) for r in read_metrics(self._dir / f"measured-{number:02d}.jsonl")
        ]

    def _told(self, stage: str) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            if self._on_progress is not None:
                self._on_progress(stage, done, total)

        return told


def _search_row(
    pairs: Sequence[SelfMadePair], places: Sequence[Candidates], config: SelfImproveConfig
) -> dict[str, Any]:
    """What is known of a round's candidates: the pairs' two rewards, how far either spreads, and
    what the closed form expects of training on such scores."""
    beta = config.preference.beta

    def gap(name: str) -> float:
        return _mean([getattr(p, name)[0] - getattr(p, name)[1] for p in pairs])

    own = _mean([float(np.std(place.confidence)) for place in places])
    other = _mean([float(np.std(place.calibrator)) for place in places])
    part = (1 - config.calibration) * own
    return {
        "pairs": len(pairs),
        "places": len(places),
        "candidates": sum(len(place.scores) for place in places),
        "chosen_minus_rejected": {name: gap(name) for name in ("confidence", "calibrator")},
        "chosen_words": _mean([len(pair.chosen.split()) for pair in pairs]),
        "rejected_words": _mean([len(pair.rejected.split()) for pair in pairs]),
        "expected_gain": {
            "confidence": _mean([p.expected_gain(p.confidence, beta) for p in places]),
            "calibrator": _mean([p.expected_gain(p.calibrator, beta) for p in places]),
        },
        "spread_ratio": config.calibration * other / part if part > 0 else None,
        "calibrator_decides": config.scale == "rank"
        and calibrator_decides(config.calibration, config.candidates),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))
