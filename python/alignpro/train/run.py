"""From a configuration to a run: load what it names, check it, and start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignpro.config import SftConfig, TrainConfig, check_config, to_mapping
from alignpro.data.load import PromptRow, load_pairs, load_prompts, stack_columns
from alignpro.files import write_json
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import LoraWeights, load_peft, save_peft
from alignpro.models.chat_template import today
from alignpro.models.language_model import ChatModel
from alignpro.models.native_model import NativeModel, load_model, load_models
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.run_directory import CALLS, check_run_dir, open_run_dir, recorded_date
from alignpro.train.callbacks import TrainCallback
from alignpro.train.closed_form import ClosedFormFit, OnProgress
from alignpro.train.critic import ValueHead
from alignpro.train.held_out import load_held_out
from alignpro.train.metrics import MetricsLog
from alignpro.train.policy import LoraPolicy, Reference
from alignpro.train.sft import fit, fit_pairs
from alignpro.train.trackers import check_trackers
from alignpro.train.trainer import Trainer
from alignpro.types import Reward


def run_sft(
    config: SftConfig,
    *,
    overwrite: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] | None = None,
) -> LoraWeights:
    """Warm-start a prompter; writes config.json, metrics.jsonl and adapter/ to its directory."""
    check_config(config, SftConfig)
    check_run_dir(config.run_dir, overwrite=overwrite)
    pairs = load_pairs(config.data)
    config = replace(config, date=config.date or today())
    model = load_model(config.prompter, config.threads, date=config.date)
    policy = LoraPolicy.fresh(model, config.lora, seed=config.seed)
    rows = fit(policy, fit_pairs(model, pairs, config), config)
    with open_run_dir(config.run_dir, overwrite=overwrite) as directory:
        run_dir = directory.path
        write_json(run_dir / "config.json", to_mapping(config))
        log = MetricsLog(run_dir / "metrics.jsonl")
        for row in rows:
            log.append(row)
            if on_step is not None:
                on_step(row)
        weights = policy.weights()
        save_peft(run_dir / "adapter", weights)
    return weights


def run_train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
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
    trainer = make_trainer(config, resume=resume, overwrite=overwrite)
    if isinstance(trainer, ClosedFormFit):
        trainer.rollouts(on_progress)
    trainer.train(callbacks)
    return trainer


def make_trainer(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False
) -> Trainer | ClosedFormFit:
    """A trainer with everything the configuration names: models, adapter, prompts and reward.

    The reference is kept in run_dir/reference, so that a resume holds on to the same one.
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
    start = config.trained.adapter
    if resume and (run_dir / "reference").is_dir():
        start = str(run_dir / "reference")
    trained = _trained(config, prompter, target)
    weights = (
        None if start is None else load_peft(Path(start), trained.lora_modules, trained.base_table)
    )
    return trainer_from(
        *(config, prompter, target, reward, rows, weights),
        held_out=held_out,
        resume=resume,
        overwrite=overwrite,
    )


def trainer_from(
    config: TrainConfig,
    prompter: NativeModel,
    target: NativeModel | ChatModel,
    reward: Reward,
    rows: Sequence[PromptRow],
    weights: LoraWeights | None,
    *,
    held_out: Sequence[PromptRow] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Trainer | ClosedFormFit:
    """A trainer over loaded parts. ``weights``: where training starts, and the reference; None is a
    fresh adapter, whose reference is the base model. ``held_out``: see `load_held_out`."""
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
    options: dict[str, Any] = {
        "reference": reference,
        "columns": stack_columns(rows),
        "resume": resume,
        "overwrite": overwrite,
    }
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
    if weights is not None and not (trainer.run_dir / "reference").is_dir():
        save_peft(trainer.run_dir / "reference", weights)
    return trainer


def _trained(
    config: TrainConfig, prompter: NativeModel, target: NativeModel | ChatModel
) -> NativeModel:
    if config.policy == "prompter":
        return prompter
    assert isinstance(target, NativeModel)  # the configuration's rule
    return target
