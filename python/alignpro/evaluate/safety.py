"""What the arms do on marked prompts, where some answers are harmful, and on the others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from alignpro.config import EvalConfig, SafetyConfig
from alignpro.data.files import DataError
from alignpro.data.load import PromptRow, read_flag, stack_columns
from alignpro.evaluate.arms import Arm
from alignpro.evaluate.results import ArmSafety, Jailbreak, SafetyResult
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns, no_column
from alignpro.rewards.combine import score_rollout
from alignpro.rewards.house_rules import REFUSAL
from alignpro.statistics import bootstrap_mean_ci, paired_difference, proportion_ci
from alignpro.theory.jailbreak import expanded_volume, harmful_volume, jailbreak_bound
from alignpro.types import Prompt, Reward

_log = logging.getLogger(__name__)
_LEAST = 2  # prompts of either kind, for an interval


def check_safety(config: SafetyConfig, rows: Sequence[PromptRow]) -> Reward:
    """What scores harm, made before prompter and target are loaded. Raises ValueError for marks
    that are none, too few prompts of either kind, a reward that is not there or has not its
    column."""
    columns = {name for row in rows for name in row.columns}
    if config.where not in columns:
        raise DataError(f"safety: {no_column(config.where, columns)}; where names another")
    marked = sum(read_flag(row, config.where) for row in rows)
    for count, kind in ((marked, "marked"), (len(rows) - marked, "ordinary")):
        if count < _LEAST:
            raise DataError(
                f"safety: expected {_LEAST} or more {kind} prompts by column {config.where!r}, "
                f"got {count} of {len(rows)}"
            )
    harm = build_reward(config.harm)
    check_columns(harm, stack_columns(rows))
    return harm


def measure_safety(
    arms: Mapping[str, Arm], rows: Sequence[PromptRow], config: EvalConfig, harm: Reward
) -> SafetyResult:
    """Harm on marked prompts; refusals and reward on the others. rows: those of the arms, and maybe
    more. harm: of `check_safety`; a marked prompt that it scores no answer of, in an arm, is left
    out.

    Raises ValueError for fewer than 2 prompts left of either kind.
    """
    assert config.safety is not None
    options = config.safety
    read = _rows_of(next(iter(arms.values())).rollout.prompts, rows)
    flags = [read_flag(row, options.where) for row in read]
    marked = [index for index, flag in enumerate(flags) if flag]
    ordinary = [index for index, flag in enumerate(flags) if not flag]
    columns = stack_columns(read)
    harms = {n: score_rollout(harm, arm.rollout, columns).rewards for n, arm in arms.items()}
    # What got no score (None) is not known to be harmless.
    scored = [index for index in marked if all(scores[index] for scores in harms.values())]
    if min(len(scored), len(ordinary)) < _LEAST:
        raise ValueError(
            f"safety: expected {_LEAST} or more prompts of either kind with answers in every arm, "
            f"got {len(scored)} marked ones with a score of {options.harm!r} and {len(ordinary)} "
            "others"
        )
    if len(scored) < len(marked):
        _log.warning(
            "safety: %d of %d marked prompts are left out: %r gave no answer of an arm a score",
            *(len(marked) - len(scored), len(marked), options.harm),
        )
    marked = scored
    rates: dict[str, list[float]] = {}  # of marked prompts: the share of responses that harm
    rewards: dict[str, list[float]] = {}  # of ordinary ones
    results = {}
    for name, arm in arms.items():
        rates[name] = [_share(s >= options.threshold for s in harms[name][i]) for i in marked]
        rewards[name] = [arm.per_prompt[i] for i in ordinary]
        rate = proportion_ci(sum(rates[name]), len(marked))
        refusals = [
            _share(REFUSAL.search(text) is not None for text in arm.response_texts(i))
            for i in ordinary
        ]
        results[name] = ArmSafety(
            harm_rate=rate,
            in_zone=_share(r >= options.zone for r in rates[name]),
            calls=1 / rate.mean if rate.mean else None,
            refusals=_share(refusals),
            ordinary_reward=bootstrap_mean_ci(rewards[name], seed=config.seed),
        )
    pairs = [
        (left, right)
        for left in ("trained", "tuned")
        if left in arms
        for right in arms
        if right != left and (left, right) != ("tuned", "trained")
    ]
    return SafetyResult(
        marked=len(marked),
        ordinary=len(ordinary),
        zone=options.zone,
        arms=results,
        paired_harm={
            f"{left}_minus_{right}": paired_difference(rates[left], rates[right], seed=config.seed)
            for left, right in pairs
        },
        paired_reward={
            f"{left}_minus_{right}": paired_difference(
                rewards[left], rewards[right], seed=config.seed
            )
            for left, right in pairs
        },
        jailbreak=_jailbreak(options),
    )


def _rows_of(prompts: Sequence[Prompt], rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Of each prompt, in the order of the rows, its own: a prompt may stand in several."""
    left, found = iter(rows), []
    for prompt in prompts:
        found.append(next(row for row in left if row.prompt == prompt))
    return found


def _jailbreak(options: SafetyConfig) -> Jailbreak | None:
    of = options.simplex
    if of is None:
        return None
    where = (of.explanations, of.harmful, options.zone)
    return Jailbreak(
        volume=harmful_volume(*where),
        expanded_volume=expanded_volume(*where, of.epsilon),
        least_probability=jailbreak_bound(*where, of.epsilon, of.gamma),
        epsilon=of.epsilon,
        gamma=of.gamma,
    )


def _share(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
