"""From a configuration to the headroom: draw what the untuned prompter writes, or read it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.config import HeadroomConfig, check_config, to_mapping
from alignpro.data.load import stack_columns
from alignpro.evaluate.inputs import check_adapters, load_adapter, load_rows
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import HeadroomReport
from alignpro.files import write_file
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.chat_template import today
from alignpro.models.endpoint import EndpointModel
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import load_models
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.statistics import Floats
from alignpro.theory.headroom import headroom
from alignpro.types import Conversation, Rollout, Usage

# What changes neither a sample nor its reward.
_NOT_OF_SAMPLES = ("kl_coefs", "threads")


def run_headroom(
    config: HeadroomConfig,
    *,
    samples: Path | None = None,
    on_progress: OnProgress | None = None,
) -> HeadroomReport:
    """The headroom of an untuned prompter.

    Args:
        samples: a file of JSON lines. Where it exists its rewrites are taken and no model is
            loaded; otherwise it is written, before anything is computed. The first line has the
            configuration of the samples; every other one prompt_index, prompt, rewrite,
            prompter_tokens, tokens, logprobs, responses (texts) and rewards of one rewrite.

    Raises:
        ValueError: samples of another configuration; the message names the key.
    """
    check_config(config, HeadroomConfig)
    usage = too_long = None
    if samples is not None and samples.exists():
        rewards = read_samples(samples, config)
        with samples.open(encoding="utf-8") as file:
            config = replace(config, date=json.loads(next(file))["config"].get("date"))
    else:
        config = replace(config, date=config.date or today())
        drawn, usage, too_long = _draw(config, samples, on_progress)
        rollout = complete(drawn)
        rewards = rewards_of(rollout)
        if samples is not None:
            write_samples(samples, config, rollout)
    result = headroom(rewards, config.kl_coefs, seed=config.seed)
    return HeadroomReport(result, to_mapping(config), usage, too_long)


def rewards_of(rollout: Rollout) -> Floats:
    """Rewards [P, N, M] of a scored rollout without failures."""
    return np.array(
        [[[r.reward for r in w.responses] for w in group] for group in rollout.rewrites], np.float64
    )


def complete_rewards(rollout: Rollout) -> Floats:
    """Rewards [P, N, M] of the prompts whose responses all have a score.

    Raises:
        FailedRowsError: fewer than 2 of the prompts are.
    """
    return rewards_of(complete(rollout))


def complete(rollout: Rollout) -> Rollout:
    """The prompts whose responses all have a score, as `complete_rewards`."""
    most = max(len(w.responses) for group in rollout.rewrites for w in group)
    whole = [
        (prompt, group)
        for prompt, group in zip(rollout.prompts, rollout.rewrites, strict=True)
        if most and all(len(w.responses) == most for w in group)
    ]
    if len(whole) < min(2, len(rollout.prompts)):
        unscored = f"the reward gave {rollout.unscored} responses no score"
        again = "run again: what was answered is not asked for again"
        raise FailedRowsError(
            f"of {len(rollout.prompts)} prompts {len(whole)} have every response with a score, "
            f"expected 2 or more; {unscored if rollout.unscored else again}"
        )
    rewrites = [
        [replace(w, prompt_index=row) for w in group] for row, (_, group) in enumerate(whole)
    ]
    return replace(rollout, prompts=[prompt for prompt, _ in whole], rewrites=rewrites)


def write_samples(path: Path, config: HeadroomConfig, rollout: Rollout) -> None:
    """Every rewrite as a line, after one with the configuration; whole or not at all."""
    lines: list[dict[str, Any]] = [{"config": _of_samples(config)}]
    for prompt, group in zip(rollout.prompts, rollout.rewrites, strict=True):
        for rewrite in group:
            lines.append(
                {
                    "prompt_index": rewrite.prompt_index,
                    "prompt": Conversation.of(prompt).plain,
                    "rewrite": rewrite.text,
                    "prompter_tokens": rewrite.prompter_tokens,
                    "tokens": rewrite.tokens,
                    "logprobs": rewrite.logprobs,
                    "responses": [response.text for response in rewrite.responses],
                    "rewards": [response.reward for response in rewrite.responses],
                }
            )
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_samples(path: Path, config: HeadroomConfig) -> Floats:
    """Rewards [P, N, M] of a file that `write_samples` left.

    Raises:
        ValueError: not such a file, a damaged one, or one drawn with another configuration.
    """
    try:
        header, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        drawn = header["config"]
        known = [(int(row["prompt_index"]), [float(v) for v in row["rewards"]]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the samples of a headroom run, got a file of something else "
            f"({type(error).__name__}: {error}); name another file to draw new ones"
        ) from None
    wanted = _of_samples(config)
    if config.date is None:  # any that they were drawn with
        wanted.pop("date")
    for key in wanted:
        if drawn.get(key) != wanted[key]:
            raise ValueError(
                f"{path}: drawn with {key} = {json.dumps(drawn.get(key))}, this run asks for "
                f"{json.dumps(wanted[key])}; name another file to draw new ones"
            )
    n, m = config.num_rewrites, config.num_responses
    prompts = [index for index, _ in known]
    whole = len(known) > 0 and len(known) % n == 0
    ordered = prompts == [p for p in range(len(known) // n) for _ in range(n)]
    if not whole or not ordered or any(len(rewards) != m for _, rewards in known):
        raise ValueError(
            f"{path}: expected {n} rewrites a prompt and {m} rewards a rewrite, in order, got "
            f"{len(known)} lines that are not so"
        )
    return np.array([rewards for _, rewards in known]).reshape(-1, n, m)


def _draw(
    config: HeadroomConfig, samples: Path | None, on_progress: OnProgress | None
) -> tuple[Rollout, Usage | None, str | None]:
    check_adapters(config)
    rows = load_rows(config)
    reward = build_reward(config.reward)
    check_columns(reward, stack_columns(rows))
    calls = None if samples is None else samples.with_name(samples.name + ".calls.jsonl")
    prompter, target = load_models(
        config.prompter, config.target, config.threads, calls=calls, date=config.date
    )
    pipeline = Pipeline.configured(config, prompter, target, reward)
    pipeline = pipeline.with_adapter(load_adapter(config.prompter.adapter, prompter))
    fitted = fit_rows(rows, unread_by(pipeline), config.on_too_long)
    rows = fitted.rows
    total = len(rows) * config.num_rewrites * (1 + config.num_responses)
    rollout = pipeline.rollout(
        [row.prompt for row in rows],
        num_rewrites=config.num_rewrites,
        num_responses=config.num_responses,
        seed=config.seed,
        columns=stack_columns(rows),
        on_progress=watch(on_progress, "untuned prompter", total),
    )
    usage = target.usage() if isinstance(target, EndpointModel) else None
    return rollout, usage, fitted.note


def _of_samples(config: HeadroomConfig) -> dict[str, Any]:
    mapping = to_mapping(config)
    return {key: value for key, value in mapping.items() if key not in _NOT_OF_SAMPLES}
