"""The whole story in one run: warm start, reinforcement learning, evaluation, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignpro.bench.machine import peak_rss_bytes, versions
from alignpro.config import QuickstartConfig, to_mapping
from alignpro.data.load import load_prompts, stack_columns
from alignpro.evaluate.of_run import EVALUATE, beside_the_run
from alignpro.evaluate.results import Report, to_json
from alignpro.evaluate.run import evaluate_loaded, fit_inputs, load_inputs, spend
from alignpro.files import write_json
from alignpro.lengths import fit_rows
from alignpro.models.chat_template import today
from alignpro.models.native_model import load_models
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.pipeline import Pipeline
from alignpro.report.build import build_report
from alignpro.report.plots import reward_curve
from alignpro.report.progress import Bars, TrainBar, show_sft_row
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.run_directory import CALLS, open_free_run_dir
from alignpro.train.held_out import load_held_out
from alignpro.train.metrics import MetricsLog, read_metrics
from alignpro.train.run import trainer_from
from alignpro.train.sft import fit_pairs, read_pairs, warm_start
from alignpro.train.soft_prompt import fresh_policy
from alignpro.train.trackers import check_trackers
from alignpro.train.trainer import unread_in_training

_PACKAGES = ("alignpro", "numpy", "torch", "tokenizers", "vaderSentiment")  # decide the numbers


@dataclass(frozen=True)
class QuickstartResult:
    run_dir: Path
    report: Report  # report.json
    metrics: list[dict[str, Any]]  # metrics.jsonl


def run_quickstart(config: QuickstartConfig) -> QuickstartResult:
    """Run every stage and write report.json, report.html, reward.png, metrics.jsonl, adapter/,
    reference/ (the warm-started prompter, which is the untuned arm) and evaluate.json (what the
    evaluation asks for beside the run, for `alignpro evaluate --run`) to a new directory.

    Raises:
        ValueError, OSError: bad input, before anything is written.
    """
    config = replace(config, date=config.date or today())
    sft, train, evaluation = config.stages()
    check_trackers(train.track)
    held_out = load_inputs(evaluation)
    reward = build_reward(train.reward)
    pairs, sft = read_pairs(sft)
    train_rows = load_prompts(train.data)
    watched = load_held_out(train, train_rows, load_prompts)
    check_columns(reward, stack_columns(train_rows))
    seconds: dict[str, float] = {}

    with contextlib.ExitStack() as held, Bars(f"finding {config.prompter.name}") as bars:
        with _timed(seconds, "download"):
            resolve_model(config.prompter.name)
        directory = open_free_run_dir(config.run_dir)
        held.enter_context(directory.held())
        held.enter_context(directory.unless_refused())
        folder = directory.path
        train = replace(train, run_dir=str(folder))
        bars.doing(f"loading {config.prompter.name}")
        with _timed(seconds, "load"):
            prompter, target = load_models(
                train.prompter,
                train.target,
                train.threads,
                calls=folder / CALLS,
                date=config.date,
            )
        pipeline = Pipeline.configured(train, prompter, target, reward)
        for given in (train_rows, watched):  # before the warm start, which takes minutes
            if given and train.on_too_long == "error":
                fit_rows(given, unread_in_training(train, pipeline), "error")
        if evaluation.on_too_long == "error":
            fit_inputs(
                evaluation, Pipeline.configured(evaluation, prompter, target, reward), held_out
            )
        with _timed(seconds, "sft"):
            bars.show("warm start", 0, sft.steps)
            policy, _ = fresh_policy(prompter, sft)
            sft_rows = []
            fitted = fit_pairs(prompter, pairs, sft, policy.rows)
            for row in warm_start(policy, fitted, sft).rows():
                sft_rows.append(row)
                show_sft_row(bars, row, sft.steps)
            warm = policy.weights()
        with _timed(seconds, "train"):
            trainer = trainer_from(
                *(train, prompter, target, reward, train_rows, warm),
                held_out=watched,
                run_dir=directory,
            )
            log = MetricsLog(folder / "sft-metrics.jsonl")
            for row in sft_rows:
                log.append(row)
            # There before the first step: `alignpro evaluate --run` compares what was resumed.
            write_json(folder / EVALUATE, beside_the_run(evaluation, folder))
            trainer.train([TrainBar(bars)], bars.show)
        with _timed(seconds, "evaluate"), directory:
            trained = trainer.policy.weights()
            metrics = folder / "metrics.jsonl"
            outcome = evaluate_loaded(
                spend(evaluation, read_metrics(metrics), str(metrics)),
                prompter,
                target,
                reward,
                held_out,
                {"untuned": warm, "trained": trained},
                bars.show,
            )
        report = Report(
            outcome,
            model=config.prompter.name,
            reward=config.reward,
            seed=config.seed,
            seconds=seconds,
            peak_rss_bytes=peak_rss_bytes(),
            versions=versions(_PACKAGES)
            | {"cpu_isa": core.cpu_isa(), "threads": str(core.available_cpus())},
            config=to_mapping(config),
        )
        bars.doing("writing the report")
        rows = write_reports(folder, report)
    return QuickstartResult(folder, report, rows)


def write_reports(run_dir: Path, report: Report) -> list[dict[str, Any]]:
    """report.json, report.html and reward.png for a run; returns its metrics."""
    write_json(run_dir / "report.json", to_json(report))
    metrics = build_report(run_dir).metrics
    reward_curve(metrics, run_dir / "reward.png", evaluation=report.evaluation)
    return metrics


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - started
