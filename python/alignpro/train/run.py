"""From a configuration to a run: load what it names, check it, and start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from alignpro import fingerprints
from alignpro.config import (
    PreferConfig,
    SelfImproveConfig,
    SftConfig,
    TrainConfig,
    check_config,
    to_mapping,
)
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.data.preferences import load_preferences
from alignpro.interrupts import interruptible, interrupts_deferred
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import AdapterWeights
from alignpro.models.chat_template import today
from alignpro.models.language_model import ChatModel
from alignpro.models.native_model import NativeModel, load_model, load_models
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.run_directory import (
    CALLS,
    RunDirectory,
    check_kind,
    check_run_dir,
    config_of_run,
    one_line,
    open_run_dir,
    recorded_date,
)
from alignpro.train.anchor import anchor_of, anchors_of
from alignpro.train.callbacks import OnProgress, TrainCallback
from alignpro.train.checkpoint import begin_run, load_checkpoint, save_checkpoint
from alignpro.train.closed_form import ClosedFormFit
from alignpro.train.critic import ValueHead
from alignpro.train.fit import Fit
from alignpro.train.held_out import load_held_out
from alignpro.train.metrics import MetricsLog, truncate_metrics
from alignpro.train.policy import Policy, Reference, save_trained, with_policy
from alignpro.train.preference import fit_preferences, preference_fit
from alignpro.train.sft import fit_pairs, read_pairs, warm_start
from alignpro.train.soft_prompt import check_shape, fresh_policy, policy_from
from alignpro.train.trackers import check_trackers
from alignpro.train.trainer import Trainer, said_of_resume, unread_in_training
from alignpro.types import Reward

_log = logging.getLogger(__name__)
OnStep = Callable[[Mapping[str, Any]], None]
Run = TypeVar("Run", SftConfig, PreferConfig, TrainConfig, SelfImproveConfig)


def run_sft(
    config: SftConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_step: OnStep | None = None,
) -> AdapterWeights:
    """Warm-start a prompter; writes config.json, metrics.jsonl, checkpoints/ and adapter/ to its
    directory. resume, overwrite, allow_changes, and what interrupts: as for `Trainer`.
    """
    config, _ = checked_run(config, SftConfig, resume=resume, overwrite=overwrite)
    pairs, config = read_pairs(config)
    model = load_model(config.prompter, config.threads, date=config.date)
    policy, _ = fresh_policy(model, config)
    fit = warm_start(policy, fit_pairs(model, pairs, config, policy.rows), config)
    made_from = fingerprints.of_models(model, None)
    columns = {"instruction": [pair.instruction for pair in pairs]}
    made_from["data"] = fingerprints.of_rows(
        str(config.data.path), [pair.prompt for pair in pairs], columns
    )
    directory = open_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    return _run_fit(fit, "sft", directory, made_from, resume, allow_changes, on_step)


def run_prefer(
    config: PreferConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_step: OnStep | None = None,
    model: NativeModel | None = None,
    reference: Reference | None = None,
) -> AdapterWeights:
    """Train on preferences; what is written, and the arguments, are those of `run_sft`. The
    adapter that training starts with, if any, is kept in run_dir/reference.

    Args:
        model: the model that is trained, loaded already; None loads what the configuration names.
        reference: what the policy is held to; None is what training starts with.
    """
    config, run_dir = checked_run(config, PreferConfig, resume=resume, overwrite=overwrite)
    rows = load_preferences(config.data)
    held_out = load_held_out(config, rows, load_preferences)
    if config.anchor is not None:  # before a model is loaded
        anchors_of(config.anchor, rows)
        for row in held_out:
            anchor_of(config.anchor, row)
    model = model or load_model(config.trained, config.threads, date=config.date)
    weights = starting_weights(config, model, run_dir if resume else None)
    policy, start = _policy(config, model, weights)
    fit = preference_fit(
        policy,
        fit_preferences(model, rows, config, policy.rows),
        config,
        reference=start if reference is None else reference,
        held_out=fit_preferences(model, held_out, config, policy.rows) if held_out else (),
    )
    roles = (None, model) if config.policy == "target" else (model, None)
    made_from = fingerprints.of_models(*roles)
    for what, name, pairs in (
        ("data", str(config.data.path), rows),
        ("held-out data", "", held_out),
    ):
        if pairs:
            columns = {c: [getattr(row, c) for row in pairs] for c in ("chosen", "rejected")}
            if config.anchor is not None:
                columns["anchor"] = [anchor_of(config.anchor, row) for row in pairs]
            prompts = [row.prompt for row in pairs]
            made_from[what] = fingerprints.of_rows(name, prompts, columns)
    if start != "base":
        made_from["adapter that training began with"] = fingerprints.of_adapter(start)
    directory = open_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    began = None if start == "base" else start
    return _run_fit(fit, "prefer", directory, made_from, resume, allow_changes, on_step, began)


def _run_fit(
    fit: Fit,
    command: str,
    directory: RunDirectory,
    made_from: fingerprints.Fingerprints,
    resume: bool,
    allow_changes: bool,
    on_step: OnStep | None,
    reference: AdapterWeights | None = None,
) -> AdapterWeights:
    """Go on with what the directory holds, do the steps that are left, and write adapter/."""
    run_dir = directory.path
    log = MetricsLog(run_dir / "metrics.jsonl")

    def restore(same: Mapping[str, str]) -> int:
        checkpoint = load_checkpoint(run_dir, fit.policy.model.lora_modules)
        if checkpoint is not None:
            fit.restore(checkpoint, same)
        truncate_metrics(log.path, steps=fit.step)
        return fit.step

    begin_run(
        *(run_dir, to_mapping(fit.config), made_from, reference),
        restore if resume else None,
        allow_changes=allow_changes,
    )
    with interruptible(), directory:
        _do_steps(fit, command, directory, log, on_step)
        assert isinstance(fit.config, (SftConfig, PreferConfig))
        save_trained(run_dir / "adapter", fit.policy, fit.config)
        weights = fit.policy.weights()
    return weights


def _do_steps(
    fit: Fit, command: str, directory: RunDirectory, log: MetricsLog, on_step: OnStep | None
) -> None:
    try:
        while fit.step < fit.config.steps:
            with interrupts_deferred():
                row = fit.advance()
                log.append(row)
            if on_step is not None:
                on_step(row)
            if fit.step % fit.config.checkpoint_every == 0 or fit.step == fit.config.steps:
                with interrupts_deferred():
                    save_checkpoint(directory.path, fit.checkpoint())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error.args = (said_of_resume(command, directory.path, fit.step),)
        if fit.step:
            with (
                directory.after(error, "writing the checkpoint"),
                interrupts_deferred(after=error),
            ):
                save_checkpoint(directory.path, fit.checkpoint())
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
    config, run_dir = checked_run(config, TrainConfig, resume=resume, overwrite=overwrite)
    check_trackers(config.track)
    rows = load_prompts(config.data)
    held_out = load_held_out(config, rows, load_prompts)
    reward = build_reward(config.reward)
    for read in filter(None, (rows, held_out)):
        check_columns(reward, stack_columns(read))
    if config.anchor is not None:  # before a model is loaded
        anchors_of(config.anchor, rows)
    prompter, target = load_roles(config)
    trained = _trained(config, prompter, target)
    weights = starting_weights(config, trained, run_dir if resume else None)
    return trainer_from(
        *(config, prompter, target, reward, rows, weights),
        held_out=held_out,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
    )


def checked_run(config: Run, cls: type[Run], *, resume: bool, overwrite: bool) -> tuple[Run, Path]:
    """What every run begins with, before anything is read: its configuration, with the date that
    templates are told, and its directory, which it may use. Raises as `check_config`,
    `check_run_dir` and `check_kind`."""
    check_config(config, cls)
    run_dir = check_run_dir(config.run_dir, resume=resume, overwrite=overwrite)
    if resume:
        check_kind(run_dir, cls)
    date = config.date or (recorded_date(run_dir) if resume else today())
    return replace(config, date=date), run_dir


def load_roles(
    config: TrainConfig | SelfImproveConfig,
) -> tuple[NativeModel, NativeModel | ChatModel]:
    """Prompter and target; where the target is trained they are one, and no prompter takes part."""
    if config.policy == "target":
        model = load_model(config.trained, config.threads, date=config.date)
        return model, model
    calls = Path(config.run_dir) / CALLS
    return load_models(
        config.prompter, config.target, config.threads, calls=calls, date=config.date
    )


def starting_weights(
    config: TrainConfig | PreferConfig | SelfImproveConfig, model: NativeModel, run_dir: Path | None
) -> AdapterWeights | None:
    """Where training starts: what the run that is resumed kept of it, else the configuration's.

    Raises ValueError for an adapter of another shape than the configuration asks for, and for
    another one than the run that is resumed began with."""
    given = config.trained.adapter
    kept = None if run_dir is None else run_dir / "reference"
    if run_dir is not None and kept is not None and kept.exists():
        try:
            weights = model.load_adapter(kept)
        except (OSError, ValueError) as error:
            if given is None:
                raise ValueError(
                    f"{kept}: damaged ({one_line(error)}), and the run has no other copy of what "
                    "its training began with"
                ) from None
            _log.warning("%s: damaged (%s); reading %s again", kept, one_line(error), given)
        else:
            before = config_of_run(run_dir)
            assert not isinstance(before, SftConfig)  # `check_kind`
            if given is not None and given != before.trained.adapter:
                _check_same_adapter(weights, model.load_adapter(given), given, kept)
            return weights
    if given is None:
        return None
    weights = model.load_adapter(given)
    check_shape(config, weights)
    return weights


def _check_same_adapter(
    kept: AdapterWeights, given: AdapterWeights, name: str, reference: Path
) -> None:
    if fingerprints.of_adapter(kept) != fingerprints.of_adapter(given):
        raise ValueError(
            f"cannot resume: adapter {name}: not what the run began with, which is in {reference}; "
            "run_dir=... starts another run"
        )


def trainer_from(
    config: TrainConfig,
    prompter: NativeModel,
    target: NativeModel | ChatModel,
    reward: Reward,
    rows: Sequence[PromptRow],
    weights: AdapterWeights | None,
    *,
    held_out: Sequence[PromptRow] = (),
    **options: Any,
) -> Trainer | ClosedFormFit:
    """A trainer over loaded parts. ``weights``: where training starts, and the reference; None is a
    fresh adapter (`fresh_policy`). ``held_out``: see `load_held_out`.
    ``options``: run_dir, resume, overwrite and allow_changes of `TrainingRun`."""
    trained = _trained(config, prompter, target)
    policy, reference = _policy(config, trained, weights)
    pipeline = Pipeline.configured(config, prompter, target, reward)
    of_policy = with_policy(pipeline, policy, config)
    rewrites = config.policy == "prompter"
    plain = unread_in_training(config, of_policy)
    # The reference alone reads an anchor: no target answers it, and no reward scores it.
    anchored = unread_by(of_policy.without_reward(), rewrites=rewrites, responses=not rewrites)

    def unread(row: PromptRow) -> str | None:
        anchor = anchor_of(config.anchor, row)
        reason = None if anchor is None else anchored(replace(row, prompt=anchor))
        return plain(row) if reason is None else f"the anchor {reason}"

    fitted = fit_rows(rows, unread, config.on_too_long)
    rows, held_out = fitted.rows, fit_rows(held_out, plain, config.on_too_long).rows
    pieces = (config, pipeline, policy, [row.prompt for row in rows])
    options |= {"reference": reference, "columns": stack_columns(rows)}
    trainer: Trainer | ClosedFormFit
    if config.algorithm == "closed_form":
        trainer = ClosedFormFit(*pieces, **options)
    else:
        value_head = None
        if config.ppo.value_head:
            value_head = ValueHead(int(trained.config["hidden_size"]))
        if config.anchor is not None:
            options["anchors"] = anchors_of(config.anchor, rows)
        trainer = Trainer(*pieces, value_head=value_head, held_out=held_out, **options)
    if fitted.note is not None:
        trainer.notes["too_long"] = fitted.note
    return trainer


def _policy(
    config: TrainConfig | PreferConfig, model: NativeModel, weights: AdapterWeights | None
) -> tuple[Policy, Reference]:
    """What is trained, and what it is held to. weights: as of `trainer_from`."""
    if weights is None:
        return fresh_policy(model, config)
    return policy_from(model, config, weights)


def _trained(
    config: TrainConfig, prompter: NativeModel, target: NativeModel | ChatModel
) -> NativeModel:
    if config.policy == "prompter":
        return prompter
    assert isinstance(target, NativeModel)  # the configuration's rule
    return target
