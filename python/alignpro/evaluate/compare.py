"""What the arms' numbers say: means with intervals, paired differences, lengths, copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.config import ARMS, EvalConfig, read_requirement
from alignpro.evaluate.arms import Arm
from alignpro.evaluate.results import (
    ArmResult,
    Evaluation,
    GapClosed,
    Interval,
    Required,
    Sample,
    SampleArm,
)
from alignpro.findings import measure
from alignpro.models.adapter import AdapterWeights
from alignpro.models.answer_scores import divergences
from alignpro.models.mixture import Mixture, soft_rows
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.statistics import (
    bootstrap_mean_ci,
    paired_difference,
    ratio_of_means,
    variance,
    variance_change,
)
from alignpro.types import Conversation, Prompt, Usage


def compare_arms(
    pipeline: Pipeline,
    arms: Mapping[str, Arm],
    config: EvalConfig,
    prompters: Mapping[str, AdapterWeights | Mixture | None],
    answers: Mapping[Prompt, Any] | None = None,
) -> Evaluation:
    """The arms side by side, and what the configuration requires of them.

    answers: by prompt, what the reward looks for, and so what a rewrite should not hold.
    """
    seconds = math.fsum(arm.rollout.seconds["generate"] for arm in arms.values())
    tokens = sum(arm.rollout.generated_tokens for arm in arms.values())
    used = [
        response.usage
        for arm in arms.values()
        for group in arm.rollout.rewrites
        for rewrite in group
        for response in rewrite.responses
        if response.usage is not None
    ]
    rewards = {name: arm.per_prompt for name, arm in arms.items()}
    per_rewrite, per_token = _kl(pipeline, arms, prompters)

    def way(start: str, end: str) -> GapClosed | None:
        if not {start, "trained", end} <= set(arms):
            return None
        pieces = (rewards[start], rewards["trained"], rewards[end])
        return gap_closed(*pieces, seed=config.seed, ends=(start, end))

    def against(name: str) -> dict[str, Interval]:
        return {
            f"{name}_minus_{other}": paired_difference(
                rewards[name], rewards[other], seed=config.seed
            )
            for other in arms
            if name in arms and other != name
        }

    return Evaluation(
        arms={name: _summary(arm, pipeline, config, answers) for name, arm in arms.items()},
        paired=against("trained"),
        kl_per_rewrite=per_rewrite,
        kl_per_token=per_token,
        tokens_per_second=tokens / max(seconds, 1e-9),
        samples=_samples(arms, config.num_samples),
        failed_responses=sum(len(arm.rollout.failed) for arm in arms.values()) or None,
        unscored_responses=sum(arm.rollout.unscored for arm in arms.values()) or None,
        target_usage=sum(used, Usage()) if used else None,
        gap_closed=way("untuned", "tuned"),
        variance_change=_variance_change(arms, config.seed),
        static_to_labelled=way("static", "labelled"),
        soft_differences=against("soft") or None,
        required=_required(rewards, config),
    )


def gap_closed(
    start: Sequence[float],
    trained: Sequence[float],
    end: Sequence[float],
    *,
    seed: int,
    ends: tuple[str, str] = ("untuned", "tuned"),
) -> GapClosed:
    """Share of the way between two arms (``ends``) that the prompter has come: (trained - start) /
    (end - start), rewards by prompt [n], with an interval that resamples prompts jointly.

    A gap whose own interval holds 0 has no share: dividing by noise gives any number.
    """
    gap = paired_difference(end, start, seed=seed)
    if gap.low <= 0 <= gap.high:
        names = (ARMS[name] for name in reversed(ends))
        reason = (
            f"the {' is not clearly apart from the '.join(names)}: "
            f"{gap.mean:+.3f}, 95% interval {gap.low:+.3f} to {gap.high:+.3f}"
        )
        return GapClosed(None, None, gap, reason)
    gained = [a - b for a, b in zip(trained, start, strict=True)]
    possible = [a - b for a, b in zip(end, start, strict=True)]
    share = ratio_of_means(gained, possible, seed=seed)
    return GapClosed(share.mean, share.ci95, gap)


def _variance_change(arms: Mapping[str, Arm], seed: int) -> Interval | None:
    """Of single responses, as the paper's figure has it; None without both prompters, or where
    every response of the untuned one earns the same."""
    if not {"untuned", "trained"} <= set(arms):
        return None
    untuned = arms["untuned"].rewards
    if len({reward for row in untuned for reward in row}) < 2:
        return None
    return variance_change(arms["trained"].rewards, untuned, seed=seed)


def _required(rewards: Mapping[str, Sequence[float]], config: EvalConfig) -> list[Required] | None:
    found = []
    for text in config.require:
        left, right, margin = read_requirement(text, rewards)
        difference = paired_difference(rewards[left], rewards[right], seed=config.seed)
        found.append(Required(text, left, right, difference, margin, difference.low > margin))
    return found or None


def _summary(
    arm: Arm, pipeline: Pipeline, config: EvalConfig, answers: Mapping[Prompt, Any] | None
) -> ArmResult:
    prompter = pipeline.prompter
    assert prompter is not None  # an evaluation has one
    measured = measure(
        arm.rollout,
        arm.components,
        arm.paid,
        adds=arm.adds,
        prompting=config.prompting,
        # A given text was written by no prompter, and is counted in its tokens all the same.
        count_tokens=lambda text: len(prompter.tokenizer.encode(text)),
        answers=None if answers is None else [answers.get(p) for p in arm.rollout.prompts],
    )
    rewards = [reward for row in arm.rewards for reward in row]
    return ArmResult(
        reward=bootstrap_mean_ci(arm.per_prompt, seed=config.seed),
        reward_variance=variance(rewards),
        n=len(arm.rewards),
        num_responses=len(rewards),
        **vars(measured),
        **arm.about,
    )


def _kl(
    pipeline: Pipeline,
    arms: Mapping[str, Arm],
    prompters: Mapping[str, AdapterWeights | Mixture | None],
) -> tuple[float | None, float | None]:
    """Per rewrite and per token."""
    if (
        not {"trained", "untuned"} <= set(prompters)
        or pipeline.rewrite_params.temperature == 0  # a greedy rewrite is no draw from the policy
        or not isinstance(pipeline.prompter, NativeModel)  # remote: shows no distributions
        or _of_sequences(prompters["trained"])  # which are no draws of its tokens' distributions
        or soft_rows(prompters["trained"]) != soft_rows(prompters["untuned"])  # read other tokens
    ):
        return None, None
    rewrites = [w for group in arms["trained"].rollout.rewrites for w in group]
    found = divergences(
        pipeline.prompter,
        [w.prompter_tokens for w in rewrites],
        [w.tokens for w in rewrites],
        pipeline.rewrite_params.temperature,
        policy=prompters["trained"],
        reference=prompters["untuned"],
    )
    total = math.fsum(one.kl for one in found)
    return total / len(rewrites), total / sum(len(w.tokens) for w in rewrites)


def _of_sequences(prompter: AdapterWeights | Mixture | None) -> bool:
    return isinstance(prompter, Mixture) and prompter.sampling == "sequence"


def _samples(arms: Mapping[str, Arm], count: int) -> list[Sample]:
    """Before and after for the first prompts, first draw of each: not picked for their reward."""

    def drawn(arm: Arm, index: int) -> SampleArm:
        rewrite = next(w for w in arm.rollout.rewrites[index] if w.responses)
        added = rewrite.text if arm.adds else None
        return SampleArm(rewrite.responses[0].text, arm.rewards[index][0], added)

    return [
        Sample(
            Conversation.of(prompt).text, {name: drawn(arm, index) for name, arm in arms.items()}
        )
        for index, prompt in enumerate(arms["raw"].rollout.prompts[:count])
    ]
