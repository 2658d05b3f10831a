"""From a configuration to the headroom: draw what the untuned prompter writes, or read it again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.config import HeadroomConfig, check_config, target_of, to_mapping
from alignpro.data.files import DataError
from alignpro.data.load import stack_columns
from alignpro.evaluate.inputs import check_adapters, load_adapter, load_rows, made_from_of
from alignpro.evaluate.kept import KeptArms, arms_path, calls_path, kept_date
from alignpro.evaluate.of_run import say_what_differs
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import HeadroomReport
from alignpro.files import write_json_lines
from alignpro.fingerprints import (
    Fingerprint,
    Fingerprints,
    as_fingerprints,
    differences,
    of_adapter_folder,
    of_reward,
    of_rows,
    of_template,
    other_settings,
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
from alignpro.rewards.combine import score_rollout
from alignpro.statistics import Floats
from alignpro.theory.goals import GoalsForecast, forecast_goals
from alignpro.theory.headroom import headroom
from alignpro.types import Conversation, Reward, Rollout, Usage

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
            rewrite, prompter_tokens, tokens, logprobs, responses (texts), rewards and the
            rewards of their parts of one rewrite.
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
        scored = read_samples(samples, config)
        config = replace(config, date=scored.date)
    else:
        arms = arms_path(output)
        config = replace(config, date=config.date or kept_date(arms) or today())
        calls = calls_path(samples or output)
        rollout, scored, usage, too_long, made_from = _draw(config, calls, arms, run, on_progress)
        if samples is not None:
            write_samples(samples, config, rollout, made_from, scored)
    result = headroom(scored.rewards, config.kl_coefs, seed=config.seed)
    goals = _forecast(scored, result.recommended_kl_coef or max(config.kl_coefs))
    return HeadroomReport(result, to_mapping(config), usage, too_long, goals)


@dataclass(frozen=True)
class Scored:
    """Rewards [P, N, M] of samples, and those of the reward's parts, NaN where a part gave none."""

    rewards: Floats
    parts: dict[str, Floats] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # of the parts
    date: str | None = None


def _forecast(scored: Scored, kl_coef: float) -> GoalsForecast | None:
    """Of two or more parts with a weight, over the prompts on which each part scored everything."""
    weights = {name: weight for name, weight in scored.weights.items() if weight}
    if len(weights) < 2:
        return None
    whole = np.all([np.isfinite(scored.parts[n]).all(axis=(1, 2)) for n in weights], axis=0)
    parts = {name: scored.parts[name][whole] for name in weights}
    return forecast_goals(parts, weights, kl_coef) if whole.sum() >= 2 else None


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
    whole = _whole(rollout)
    rewrites = [
        [replace(w, prompt_index=row) for w in rollout.rewrites[index]]
        for row, index in enumerate(whole)
    ]
    return replace(rollout, prompts=[rollout.prompts[i] for i in whole], rewrites=rewrites)


def _whole(rollout: Rollout) -> list[int]:
    """The prompts, by index, whose responses all have a score. Raises as `complete_rewards`."""
    most = max(len(w.responses) for group in rollout.rewrites for w in group)
    whole = [
        index
        for index, group in enumerate(rollout.rewrites)
        if most and all(len(w.responses) == most for w in group)
    ]
    if len(whole) < min(2, len(rollout.prompts)):
        unscored = f"the reward gave {rollout.unscored} responses no score"
        again = "run again: what was answered is not asked for again"
        raise FailedRowsError(
            f"of {len(rollout.prompts)} prompts {len(whole)} have every response with a score, "
            f"expected 2 or more; {unscored if rollout.unscored else again}"
        )
    return whole


def _score(
    reward: Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]]
) -> tuple[Rollout, Scored]:
    """The prompts whose responses all have a score, and the scores. Raises as `complete_rewards`,
    and `score_rollout`."""
    rollout, rewards, components, _ = score_rollout(reward, rollout, columns)
    each = iter([value for of_prompt in rewards for value in of_prompt])
    rewrites = [
        [replace(w, responses=[replace(r, reward=next(each)) for r in w.responses]) for w in group]
        for group in rollout.rewrites
    ]
    rollout = replace(rollout, rewrites=rewrites)
    whole, kept = _whole(rollout), complete(rollout)
    found = rewards_of(kept)
    ends = np.cumsum([len(of_prompt) for of_prompt in rewards])[:-1]
    terms = getattr(reward, "terms", {})
    parts = {}
    for name in terms:
        by_prompt = np.split(np.array(components[name]), ends)
        parts[name] = np.stack([by_prompt[index] for index in whole]).reshape(found.shape)
    weights = {name: weight for name, (weight, _) in terms.items()}
    return kept, Scored(found, parts, weights)


def write_samples(
    path: Path,
    config: HeadroomConfig,
    rollout: Rollout,
    made_from: Fingerprints,
    scored: Scored,
) -> None:
    """Every rewrite as a line, after one with what they were drawn from; whole or not at all."""
    head = {
        "config": _of_samples(config),
        "fingerprints": to_plain(made_from),
        "weights": scored.weights,
    }
    lines: list[dict[str, Any]] = [head]
    for p, (prompt, group) in enumerate(zip(rollout.prompts, rollout.rewrites, strict=True)):
        for n, rewrite in enumerate(group):
            parts = {name: part[p, n].tolist() for name, part in scored.parts.items()}
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
                    "parts": {
                        name: [None if v != v else v for v in values]  # NaN: abstained
                        for name, values in parts.items()
                    },
                }
            )
    write_json_lines(path, lines)


def read_samples(path: Path, config: HeadroomConfig) -> Scored:
    """What `write_samples` left in a file; no parts where it is older than they are.

    Raises:
        ValueError: not such a file, a damaged one, or one drawn with another configuration or from
            anything else, as far as it is at hand.
    """
    try:
        header, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        drawn = header["config"]
        known = [(int(row["prompt_index"]), [float(v) for v in row["rewards"]]) for row in rows]
        weights = {str(name): float(weight) for name, weight in header.get("weights", {}).items()}
        parts = {
            name: np.array([row["parts"][name] for row in rows], np.float64) for name in weights
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the samples of a headroom run, got a file of something else "
            f"({type(error).__name__}: {error}); name another file to draw new ones"
        ) from None
    date = config.date or drawn.get("date")  # any that they were drawn with
    config = replace(config, date=date)
    made_from, now = as_fingerprints(header.get("fingerprints")), _at_hand(config)
    wanted = _of_samples(config)
    settings = other_settings({k: drawn.get(k) for k in wanted}, wanted, made_from, now)
    for key, (was, value) in settings.items():
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
    shaped = {name: part.reshape(-1, n, m) for name, part in parts.items()}
    return Scored(rewards, shaped, weights, date)


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
) -> tuple[Rollout, Scored, Usage | None, str | None, Fingerprints]:
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
        pipeline.without_reward().rollout,
        prompts,
        num_rewrites=config.num_rewrites,
        num_responses=config.num_responses,
        seed=config.seed,
        on_progress=watch(on_progress, "untuned prompter", total),
    )
    kept = KeptArms.at(arms, config, made_from)
    drawn = kept.rollout("untuned", kept.hash_of(adapter), prompts, sample)
    rollout, scored = _score(reward, drawn, stack_columns(rows))
    if config.prompter.adapter is not None:
        made_from["adapter of the prompter"] = of_adapter_folder(config.prompter.adapter)
    usage = target.usage() if isinstance(target, EndpointModel) else None
    return rollout, scored, usage, fitted.note, made_from


def _of_samples(config: HeadroomConfig) -> dict[str, Any]:
    mapping = to_mapping(config)
    return {key: value for key, value in mapping.items() if key not in _NOT_OF_SAMPLES}
