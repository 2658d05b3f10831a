"""From a configuration to a run: load what it names, check it, and start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignpro import fingerprints
from alignpro.config import SftConfig, TrainConfig, check_config, to_mapping
from alignpro.data.load import PromptRow, load_pairs, load_prompts, stack_columns
from alignpro.files import write_json
from alignpro.interrupts import interruptible, interrupts_deferred
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import LoraWeights
from alignpro.models.chat_template import today
from alignpro.models.language_model import ChatModel
from alignpro.models.native_model import NativeModel, load_model, load_models
from alignpro.models.prompter_file import save_prompter
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.run_directory import (
    CALLS,
    CONFIG,
    RunDirectory,
    check_run_dir,
    one_line,
    open_run_dir,
    recorded_date,
)
from alignpro.train.callbacks import OnProgress, TrainCallback
from alignpro.train.checkpoint import load_checkpoint, save_checkpoint
from alignpro.train.closed_form import ClosedFormFit
from alignpro.train.critic import ValueHead
from alignpro.train.held_out import load_held_out
from alignpro.train.metrics import MetricsLog, truncate_metrics
from alignpro.train.policy import LoraPolicy, Reference
from alignpro.train.sft import WarmStart, fit_pairs
from alignpro.train.trackers import check_trackers
from alignpro.train.trainer import Trainer, said_of_resume
from alignpro.types import Reward

_log = logging.getLogger(__name__)


def run_sft(
    config: SftConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] | None = None,
) -> LoraWeights:
    """Warm-start a prompter; writes config.json, metrics.jsonl, checkpoints/ and adapter/ to its
    directory. resume, overwrite, allow_changes, and what interrupts: as for `Trainer`.
    """
    check_config(config, SftConfig)
    run_dir = check_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    pairs = load_pairs(config.data)
    config = replace(config, date=config.date or (recorded_date(run_dir) if resume else today()))
    model = load_model(config.prompter, config.threads, date=config.date)
    policy = LoraPolicy.fresh(model, config.lora, seed=config.seed)
    warm = WarmStart(policy, fit_pairs(model, pairs, config), config)
    made_from = fingerprints.of_models(model, None)
    columns = {"instruction": [pair.instruction for pair in pairs]}
    made_from["data"] = fingerprints.of_rows(
        str(config.data.path), [pair.prompt for pair in pairs], columns
    )
    directory = open_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    log = MetricsLog(run_dir / "metrics.jsonl")
    changed: list[str] = []
    if resume:
        changed, same = fingerprints.check_same_inputs(
            run_dir, made_from, allow_changes=allow_changes
        )
        checkpoint = load_checkpoint(run_dir, model.lora_modules)
        if checkpoint is not None:
            warm.restore(checkpoint, same)
        truncate_metrics(log.path, steps=warm.step)
    fingerprints.write_fingerprints(run_dir, made_from, changed=changed, step=warm.step)
    write_json(run_dir / CONFIG, to_mapping(config))
    with interruptible(), directory:
        _fit(warm, directory, log, on_step)
        weights = warm.policy.weights()
        save_prompter(
            run_dir / "adapter", weights, model.tokenizer, config.prompting, config.rewrite
        )
    return weights


def _fit(
    warm: WarmStart,
    directory: RunDirectory,
    log: MetricsLog,
    on_step: Callable[[Mapping[str, Any]], None] | None,
) -> None:
    try:
        while warm.step < warm.config.steps:
            with interrupts_deferred():
                row = warm.advance()
                log.append(row)
            if on_step is not None:
                on_step(row)
            if warm.step % warm.config.checkpoint_every == 0 or warm.step == warm.config.steps:
                with interrupts_deferred():
                    save_checkpoint(directory.path, warm.checkpoint())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error.args = (said_of_resume("sft", directory.path, warm.step),)
        if warm.step:
            with (
                directory.after(error, "writing the checkpoint"),
                interrupts_deferred(after=error),
            ):
                save_checkpoint(directory.path, warm.checkpoint())
        raise


def run_train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    callbacks: Sequence[TrainCallback] = (),
    on_progress: OnProgress | None = None,
) -> Trainer | ClosedFormFit:
    """Train what the configuration names; the trainer is returned when it has ended, with its
    ``policy``, ``pipeline`` and ``run_dir``.

    Args:
        callbacks: who watches the steps; see `TrainCallback`.
        on_progress: told of the rollouts of a closed form as they come.

    Raises as `make_trainer` and `Trainer.train`.
    """
    trainer = make_trainer(config, resume=resume, overwrite=overwrite, allow_changes=allow_changes)
    trainer.train(callbacks, on_progress)
    return trainer


def make_trainer(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
) -> Trainer | ClosedFormFit:
    """A trainer with everything the configuration names: models, adapter, prompts and reward.

    The reference is kept in run_dir/reference, so that a resume holds on to the same one.
    resume, overwrite, allow_changes: see `TrainingRun`.
    """
    check_config(config, TrainConfig)
    run_dir = check_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    check_trackers(config.track)
    rows = load_prompts(config.data)
    held_out = load_held_out(config, rows)
    reward = build_reward(config.reward)
    for read in filter(None, (rows, held_out)):
        check_columns(reward, stack_columns(read))
    date = config.date or (recorded_date(run_dir) if resume else today())
    config = replace(config, date=date)
    prompter: NativeModel
    target: NativeModel | ChatModel
    if config.policy == "target":  # no prompter takes part
        prompter = target = load_model(config.trained, config.threads, date=date)
    else:
        calls = Path(config.run_dir) / CALLS
        prompter, target = load_models(
            config.prompter, config.target, config.threads, calls=calls, date=date
        )
    trained = _trained(config, prompter, target)
    weights = _start(config, trained, run_dir if resume else None)
    return trainer_from(
        *(config, prompter, target, reward, rows, weights),
        held_out=held_out,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
    )


def _start(config: TrainConfig, model: NativeModel, run_dir: Path | None) -> LoraWeights | None:
    """Where training starts: what the run that is resumed kept of it, else the configuration's."""
    given = config.trained.adapter
    kept = None if run_dir is None else run_dir / "reference"
    if kept is not None and kept.exists():
        try:
            return model.load_adapter(kept)
        except (OSError, ValueError) as error:
            if given is None:
                raise ValueError(
                    f"{kept}: damaged ({one_line(error)}), and the run has no other copy of what "
                    "its training began with"
                ) from None
            _log.warning("%s: damaged (%s); reading %s again", kept, one_line(error), given)
    return None if given is None else model.load_adapter(given)


def trainer_from(
    config: TrainConfig,
    prompter: NativeModel,
    target: NativeModel | ChatModel,
    reward: Reward,
    rows: Sequence[PromptRow],
    weights: LoraWeights | None,
    *,
    held_out: Sequence[PromptRow] = (),
    **options: Any,
) -> Trainer | ClosedFormFit:
    """A trainer over loaded parts. ``weights``: where training starts, and the reference; None is a
    fresh adapter, whose reference is the base model. ``held_out``: see `load_held_out`.
    ``options``: run_dir, resume, overwrite and allow_changes of `TrainingRun`."""
    reference: Reference = "base"
    trained = _trained(config, prompter, target)
    if weights is None:
        policy = LoraPolicy.fresh(trained, config.lora, seed=config.seed)
    else:
        policy, reference = LoraPolicy(trained, weights), weights
    pipeline = Pipeline.configured(config, prompter, target, reward)
    unread = unread_by(pipeline, rewrites=config.policy == "prompter")
    fitted = fit_rows(rows, unread, config.on_too_long)
    rows, held_out = fitted.rows, fit_rows(held_out, unread, config.on_too_long).rows
    pieces = (config, pipeline, policy, [row.prompt for row in rows])
    options |= {"reference": reference, "columns": stack_columns(rows)}
    trainer: Trainer | ClosedFormFit
    if config.algorithm == "closed_form":
        trainer = ClosedFormFit(*pieces, **options)
    else:
        value_head = None
        if config.ppo.value_head:
            value_head = ValueHead(int(trained.config["hidden_size"]))
        trainer = Trainer(*pieces, value_head=value_head, held_out=held_out, **options)
    if fitted.note is not None:
        trainer.notes["too_long"] = fitted.note
    return trainer


def _trained(
    config: TrainConfig, prompter: NativeModel, target: NativeModel | ChatModel
) -> NativeModel:
    if config.policy == "prompter":
        return prompter
    assert isinstance(target, NativeModel)  # the configuration's rule
    return target
