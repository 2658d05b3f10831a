"""From a configuration to the headroom: draw what the untuned prompter writes, or read it again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.config import HeadroomConfig, check_config, differing, target_of, to_mapping
from alignpro.data.files import DataError
from alignpro.data.load import stack_columns
from alignpro.evaluate.inputs import check_adapters, load_adapter, load_rows, made_from_of
from alignpro.evaluate.kept import KeptArms, arms_path, calls_path, kept_date
from alignpro.evaluate.of_run import say_what_differs
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import HeadroomReport
from alignpro.files import write_file
from alignpro.fingerprints import (
    Fingerprint,
    Fingerprints,
    as_fingerprints,
    differences,
    of_adapter_folder,
    of_reward,
    of_rows,
    of_template,
    same_elsewhere,
    to_plain,
)
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.chat_template import today
from alignpro.models.endpoint import EndpointModel
from alignpro.models.fingerprint import fingerprint
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import load_models
from alignpro.models.resolve import find_model
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import core
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
    output: Path | None = None,
    run: Path | None = None,
    on_progress: OnProgress | None = None,
) -> HeadroomReport:
    """The headroom of an untuned prompter.

    Args:
        samples: a file of JSON lines. Where it exists its rewrites are taken and no model is
            loaded; otherwise it is written, before anything is computed. The first line has the
            configuration and the fingerprints of the samples; every other one prompt_index, prompt,
            rewrite, prompter_tokens, tokens, logprobs, responses (texts) and rewards of one
            rewrite.
        output: where the report will be written. Beside it the samples are kept when they are
            there, and a headroom that was stopped after that goes on with them.
        run: a run whose settings these are to be; a warning names what differs.

    Raises:
        ValueError: samples of another configuration, or of other models, data, adapter or reward
            as far as they are at hand; the message names what.
    """
    check_config(config, HeadroomConfig)
    usage = too_long = None
    if samples is not None and samples.exists():
        rewards, date = read_samples(samples, config)
        config = replace(config, date=date)
    else:
        arms = arms_path(output)
        config = replace(config, date=config.date or kept_date(arms) or today())
        calls = calls_path(samples or output)
        drawn, usage, too_long, made_from = _draw(config, calls, arms, run, on_progress)
        rollout = complete(drawn)
        rewards = rewards_of(rollout)
        if samples is not None:
            write_samples(samples, config, rollout, made_from)
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


def write_samples(
    path: Path, config: HeadroomConfig, rollout: Rollout, made_from: Fingerprints
) -> None:
    """Every rewrite as a line, after one with what they were drawn from; whole or not at all."""
    head = {"config": _of_samples(config), "fingerprints": to_plain(made_from)}
    lines: list[dict[str, Any]] = [head]
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


def read_samples(path: Path, config: HeadroomConfig) -> tuple[Floats, str | None]:
    """Rewards [P, N, M] of a file that `write_samples` left, and their date.

    Raises:
        ValueError: not such a file, a damaged one, or one drawn with another configuration or from
            anything else, as far as it is at hand.
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
    date = config.date or drawn.get("date")  # any that they were drawn with
    config = replace(config, date=date)
    made_from, now = as_fingerprints(header.get("fingerprints")), _at_hand(config)
    elsewhere = same_elsewhere(made_from, now)
    wanted = _of_samples(config)
    for key, (was, value) in differing({k: drawn.get(k) for k in wanted}, wanted).items():
        if key not in elsewhere:
            raise ValueError(
                f"{path}: drawn with {key} = {json.dumps(was)}, this run asks for "
                f"{json.dumps(value)}; name another file to draw new ones"
            )
    other = differences(made_from, now, "they were drawn from")
    if other:
        raise ValueError(f"{path}: {'; '.join(other)}; name another file to draw new ones")
    n, m = config.num_rewrites, config.num_responses
    prompts = [index for index, _ in known]
    whole = len(known) > 0 and len(known) % n == 0
    ordered = prompts == [p for p in range(len(known) // n) for _ in range(n)]
    if not whole or not ordered or any(len(rewards) != m for _, rewards in known):
        raise ValueError(
            f"{path}: expected {n} rewrites a prompt and {m} rewards a rewrite, in order, got "
            f"{len(known)} lines that are not so"
        )
    rewards = np.array([rewards for _, rewards in known]).reshape(-1, n, m)
    return rewards, date


def _at_hand(config: HeadroomConfig) -> Fingerprints:
    """What samples were drawn from, without loading or fetching anything: of what is on this
    machine, which need not have all of it."""
    found: Fingerprints = {}
    groups = {"prompter": config.prompter, "target": target_of(config.prompter, config.target)}
    for role, group in groups.items():
        with contextlib.suppress(OSError):
            path = None if group.endpoint is not None else find_model(group.name)
            if path is not None:
                found[f"weights of the {role}"] = Fingerprint(group.name, fingerprint(path))
                tokenizer = Tokenizer.of(core.ModelFiles(str(path))).with_template(
                    group.chat_template, group.chat_template_kwargs, config.date
                )
                found[f"chat template of the {role}"] = of_template(tokenizer)
    with contextlib.suppress(OSError, DataError):
        rows = load_rows(config)
        prompts = [row.prompt for row in rows]
        found["data"] = of_rows(str(config.data.path), prompts, stack_columns(rows))
    adapters = {
        "adapter of the prompter": config.prompter.adapter,
        "adapter of the target": groups["target"].adapter,
    }
    for what, folder in adapters.items():
        with contextlib.suppress(OSError):
            if folder is not None:
                found[what] = of_adapter_folder(folder)
    with contextlib.suppress(OSError, ValueError, ImportError):
        found |= of_reward(build_reward(config.reward))
    return found


def _draw(
    config: HeadroomConfig,
    calls: Path | None,
    arms: Path | None,
    run: Path | None,
    on_progress: OnProgress | None,
) -> tuple[Rollout, Usage | None, str | None, Fingerprints]:
    check_adapters(config)
    rows = load_rows(config)
    reward = build_reward(config.reward)
    check_columns(reward, stack_columns(rows))
    prompter, target = load_models(
        config.prompter, config.target, config.threads, calls=calls, date=config.date
    )
    adapter = load_adapter(config.prompter.adapter, prompter)
    made_from = made_from_of(config, prompter, target, reward, rows)
    say_what_differs(config, made_from, adapter, rows, run, config.prompter.adapter)
    pipeline = Pipeline.configured(config, prompter, target, reward).with_adapter(adapter)
    fitted = fit_rows(rows, unread_by(pipeline), config.on_too_long)
    rows = fitted.rows
    prompts = [row.prompt for row in rows]
    total = len(rows) * config.num_rewrites * (1 + config.num_responses)
    sample = partial(
        pipeline.rollout,
        prompts,
        num_rewrites=config.num_rewrites,
        num_responses=config.num_responses,
        seed=config.seed,
        columns=stack_columns(rows),
        on_progress=watch(on_progress, "untuned prompter", total),
    )
    kept = KeptArms.at(arms, config, made_from)
    rollout = kept.rollout("untuned", kept.hash_of(adapter), prompts, sample)
    if config.prompter.adapter is not None:
        made_from["adapter of the prompter"] = of_adapter_folder(config.prompter.adapter)
    usage = target.usage() if isinstance(target, EndpointModel) else None
    return rollout, usage, fitted.note, made_from


def _of_samples(config: HeadroomConfig) -> dict[str, Any]:
    mapping = to_mapping(config)
    return {key: value for key, value in mapping.items() if key not in _NOT_OF_SAMPLES}
