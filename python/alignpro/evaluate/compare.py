"""What the arms' numbers say: means with intervals, paired differences, lengths, copies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from alignpro.config import EvalConfig
from alignpro.evaluate.arms import Arm, kl_per_rewrite
from alignpro.evaluate.results import ArmResult, Evaluation, GapClosed, Sample, SampleArm
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.statistics import bootstrap_mean_ci, paired_difference, ratio_of_means, variance
from alignpro.types import Usage

COPIED_RUN = 3  # words
_WORD = re.compile(r"\w+")


def compare_arms(
    pipeline: Pipeline,
    arms: Mapping[str, Arm],
    config: EvalConfig,
    prompters: Mapping[str, LoraWeights | None],
) -> Evaluation:
    """The arms side by side, and ``gap_closed`` where there is a tuned target."""
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
    closed = None
    if {"untuned", "trained", "tuned"} <= set(arms):
        closed = gap_closed(
            rewards["untuned"], rewards["trained"], rewards["tuned"], seed=config.seed
        )
    return Evaluation(
        arms={name: _summary(arm, pipeline, config) for name, arm in arms.items()},
        paired={
            f"trained_minus_{name}": paired_difference(
                rewards["trained"], rewards[name], seed=config.seed
            )
            for name in arms
            if "trained" in arms and name != "trained"
        },
        kl_per_rewrite=per_rewrite,
        kl_per_token=per_token,
        tokens_per_second=tokens / max(seconds, 1e-9),
        samples=_samples(arms, config.num_samples),
        failed_responses=sum(len(arm.rollout.failed) for arm in arms.values()) or None,
        target_usage=sum(used, Usage()) if used else None,
        gap_closed=closed,
    )


def gap_closed(
    untuned: Sequence[float], trained: Sequence[float], tuned: Sequence[float], *, seed: int
) -> GapClosed:
    """Share of what tuning the target gains that the prompter gains: (trained - untuned) /
    (tuned - untuned), rewards by prompt [n], with an interval that resamples prompts jointly.

    A gap whose own interval holds 0 has no share: dividing by noise gives any number.
    """
    gap = paired_difference(tuned, untuned, seed=seed)
    if gap.low <= 0 <= gap.high:
        reason = (
            "the tuned target is not clearly apart from the untuned prompter: "
            f"{gap.mean:+.3f}, 95% interval {gap.low:+.3f} to {gap.high:+.3f}"
        )
        return GapClosed(None, None, gap, reason)
    gained = [a - b for a, b in zip(trained, untuned, strict=True)]
    possible = [a - b for a, b in zip(tuned, untuned, strict=True)]
    share = ratio_of_means(gained, possible, seed=seed)
    return GapClosed(share.mean, share.ci95, gap)


def copied_share(prompt: str, rewrite: str) -> float:
    """Share of the rewrite's words that lie in a run of three or more words (or in the whole
    rewrite, where it is shorter) that stands in the prompt: 1 for a rewrite that repeats it.

    Runs, since single words such as "the" are shared by any two texts. Case is ignored.
    """
    there, written = (_WORD.findall(text.lower()) for text in (prompt, rewrite))
    run = min(COPIED_RUN, len(written))
    if run == 0:
        return 0.0
    known = {tuple(there[i : i + run]) for i in range(len(there) - run + 1)}
    copied: set[int] = set()
    for i in range(len(written) - run + 1):
        if tuple(written[i : i + run]) in known:
            copied.update(range(i, i + run))
    return len(copied) / len(written)


def _summary(arm: Arm, pipeline: Pipeline, config: EvalConfig) -> ArmResult:
    rewrites = [w for group in arm.rollout.rewrites for w in group]
    responses = [r for w in rewrites for r in w.responses]
    result = ArmResult(
        reward=bootstrap_mean_ci(arm.per_prompt, seed=config.seed),
        reward_variance=variance([reward for row in arm.rewards for reward in row]),
        n=len(arm.rewards),
        num_responses=len(responses),
        components=arm.components,
        empty_rewrites=sum(not w.text for w in rewrites) if arm.adds else 0,
        response_tokens=sum(r.num_tokens for r in responses) / len(responses),
        **arm.about,
    )
    if not arm.adds:
        return result
    prompter = pipeline.prompter
    assert prompter is not None  # an evaluation has one
    lengths = [
        # A given text was written by no prompter, and is counted in its tokens all the same.
        len(w.tokens) if w.tokens else len(prompter.tokenizer.encode(w.text))
        for w in rewrites
    ]
    copied = [copied_share(arm.rollout.prompts[w.prompt_index], w.text) for w in rewrites if w.text]
    return replace(
        result,
        rewrite_tokens=sum(lengths) / len(lengths),
        copy_rate=sum(copied) / len(copied) if copied else None,
    )


def _kl(
    pipeline: Pipeline, arms: Mapping[str, Arm], prompters: Mapping[str, LoraWeights | None]
) -> tuple[float | None, float | None]:
    """Per rewrite and per token."""
    if (
        not {"trained", "untuned"} <= set(prompters)
        or pipeline.rewrite_params.temperature == 0  # a greedy rewrite is no draw from the policy
        or not isinstance(pipeline.prompter, NativeModel)  # remote: shows no distributions
    ):
        return None, None
    rollout = arms["trained"].rollout
    value = kl_per_rewrite(
        pipeline.prompter,
        rollout,
        policy=prompters["trained"],
        reference=prompters["untuned"],
        temperature=pipeline.rewrite_params.temperature,
    )
    lengths = [len(w.tokens) for group in rollout.rewrites for w in group]
    return value, value * len(lengths) / sum(lengths)


def _samples(arms: Mapping[str, Arm], count: int) -> list[Sample]:
    """Before and after for the first prompts, first draw of each: not picked for their reward."""

    def drawn(arm: Arm, index: int) -> SampleArm:
        rewrite = next(w for w in arm.rollout.rewrites[index] if w.responses)
        added = rewrite.text if arm.adds else None
        return SampleArm(rewrite.responses[0].text, arm.rewards[index][0], added)

    return [
        Sample(prompt, {name: drawn(arm, index) for name, arm in arms.items()})
        for index, prompt in enumerate(arms["raw"].rollout.prompts[:count])
    ]
