"""From an evaluation's configuration to its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignpro.config import EvalConfig
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.evaluate.arms import OnProgress, evaluate_arms
from alignpro.models.adapter import LoraWeights, load_peft
from alignpro.models.native_model import NativeModel, load_models
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.types import Reward


def run_evaluation(config: EvalConfig, *, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Load what the configuration names and compare the arms; returns what `evaluate_arms` does."""
    rows = load_eval_rows(config)
    reward = build_reward(config.reward)
    prompter, target = load_models(
        config.model, config.target, config.threads, config.target_compute
    )
    prompters: dict[str, LoraWeights | None] = {"untuned": _load(config.untuned, prompter)}
    if config.trained is not None:
        prompters["trained"] = _load(config.trained, prompter)
    return evaluate_loaded(config, prompter, target, reward, rows, prompters, on_progress)


def evaluate_loaded(
    config: EvalConfig,
    prompter: NativeModel,
    target: NativeModel,
    reward: Reward,
    rows: list[PromptRow],
    prompters: dict[str, LoraWeights | None],
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The same over loaded parts."""
    pipeline = Pipeline.configured(config, prompter, target, reward)
    return evaluate_arms(
        pipeline,
        [row.prompt for row in rows],
        config,
        prompters=prompters,
        columns=stack_columns(rows),
        on_progress=on_progress,
    )


def load_eval_rows(config: EvalConfig) -> list[PromptRow]:
    """The held-out rows, cut to ``num_prompts``.

    Raises:
        ValueError: fewer rows than asked for.
    """
    rows = load_prompts(config.data, split=config.split)
    wanted = config.num_prompts
    if wanted is not None and wanted > len(rows):
        raise ValueError(f"num_prompts: {config.data} has {len(rows)} rows, {wanted} asked for")
    return rows[:wanted]


def _load(folder: str | None, model: NativeModel) -> LoraWeights | None:
    return None if folder is None else load_peft(Path(folder), model.lora_modules)
