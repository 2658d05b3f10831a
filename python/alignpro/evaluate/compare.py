"""What the arms' numbers say: means with intervals, paired differences, lengths, copies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.config import EvalConfig
from alignpro.evaluate.arms import Arm, kl_per_rewrite
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.statistics import bootstrap_mean_ci, paired_difference, ratio_of_means, variance

COPIED_RUN = 3  # words
_WORD = re.compile(r"\w+")


def compare_arms(
    pipeline: Pipeline,
    arms: Mapping[str, Arm],
    config: EvalConfig,
    prompters: Mapping[str, LoraWeights | None],
) -> dict[str, Any]:
    """The arms as a part of report.json.

    Returns:
        ``arms`` {name: mean_reward, reward_variance, ci95, n, num_responses, components,
        empty_rewrites, response_tokens, rewrite_tokens, copy_rate, ...}; ``paired``
        {trained_minus_X: mean, ci95}; ``kl_per_rewrite`` and ``kl_per_token`` (nats; None without
        both prompters); ``gap_closed`` where there is a tuned target; ``tokens_per_second``;
        ``samples``. Lengths are in tokens and means.
    """
    seconds = math.fsum(arm.rollout.seconds["generate"] for arm in arms.values())
    tokens = sum(arm.rollout.generated_tokens for arm in arms.values())
    trained = arms.get("trained")
    report: dict[str, Any] = {
        "arms": {name: _summary(arm, pipeline, config) for name, arm in arms.items()},
        "paired": {
            f"trained_minus_{name}": _paired(trained, arm, config)
            for name, arm in arms.items()
            if trained is not None and name != "trained"
        },
        **_kl(pipeline, arms, prompters),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "samples": _samples(arms, config.num_samples),
    }
    if {"untuned", "trained", "tuned"} <= set(arms):
        report["gap_closed"] = gap_closed(
            *(arms[name].per_prompt for name in ("untuned", "trained", "tuned")), seed=config.seed
        )
    return report


def gap_closed(
    untuned: Sequence[float], trained: Sequence[float], tuned: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """Share of what tuning the target gains that the prompter gains: (trained - untuned) /
    (tuned - untuned), rewards by prompt [n], with an interval that resamples prompts jointly.

    A gap whose own interval holds 0 has no share: dividing by noise gives any number.
    """
    gap = paired_difference(tuned, untuned, seed=seed)
    result: dict[str, Any] = {"gap": {"mean": gap.mean, "ci95": [gap.low, gap.high]}}
    if gap.low <= 0 <= gap.high:
        reason = (
            "the tuned target is not clearly apart from the untuned prompter: "
            f"{gap.mean:+.3f}, 95% interval {gap.low:+.3f} to {gap.high:+.3f}"
        )
        return {"share": None, "ci95": None, "reason": reason, **result}
    gained = [a - b for a, b in zip(trained, untuned, strict=True)]
    possible = [a - b for a, b in zip(tuned, untuned, strict=True)]
    share = ratio_of_means(gained, possible, seed=seed)
    return {"share": share.mean, "ci95": [share.low, share.high], **result}


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


def _summary(arm: Arm, pipeline: Pipeline, config: EvalConfig) -> dict[str, Any]:
    interval = bootstrap_mean_ci(arm.per_prompt, seed=config.seed)
    rewrites = [w for group in arm.rollout.rewrites for w in group]
    responses = [r for w in rewrites for r in w.responses]
    return {
        "mean_reward": interval.mean,
        "reward_variance": variance([reward for row in arm.rewards for reward in row]),
        "ci95": [interval.low, interval.high],
        "n": len(arm.rewards),
        "num_responses": len(responses),
        "components": arm.components,
        "empty_rewrites": sum(not w.text for w in rewrites) if arm.adds else 0,
        "response_tokens": sum(len(r.tokens) for r in responses) / len(responses),
        **(_added(arm, pipeline) if arm.adds else {}),
        **arm.about,
    }


def _added(arm: Arm, pipeline: Pipeline) -> dict[str, Any]:
    """Of what stands behind or before the prompt: mean tokens, and the share that is copied."""
    rewrites = [w for group in arm.rollout.rewrites for w in group]
    lengths = [
        # A given text has no tokens of a prompter; the target's are the nearest there are.
        len(w.tokens) if w.tokens else len(pipeline.target.tokenizer.encode(w.text))
        for w in rewrites
    ]
    copied = [copied_share(arm.rollout.prompts[w.prompt_index], w.text) for w in rewrites if w.text]
    return {
        "rewrite_tokens": sum(lengths) / len(lengths),
        "copy_rate": sum(copied) / len(copied) if copied else None,
    }


def _paired(treated: Arm, control: Arm, config: EvalConfig) -> dict[str, Any]:
    interval = paired_difference(treated.per_prompt, control.per_prompt, seed=config.seed)
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}


def _kl(
    pipeline: Pipeline, arms: Mapping[str, Arm], prompters: Mapping[str, LoraWeights | None]
) -> dict[str, float | None]:
    if (
        not {"trained", "untuned"} <= set(prompters)
        or pipeline.rewrite_params.temperature == 0  # a greedy rewrite is no draw from the policy
        or not isinstance(pipeline.prompter, NativeModel)  # remote: shows no distributions
    ):
        return {"kl_per_rewrite": None, "kl_per_token": None}
    rollout = arms["trained"].rollout
    value = kl_per_rewrite(
        pipeline.prompter,
        rollout,
        policy=prompters["trained"],
        reference=prompters["untuned"],
        temperature=pipeline.rewrite_params.temperature,
    )
    lengths = [len(w.tokens) for group in rollout.rewrites for w in group]
    return {"kl_per_rewrite": value, "kl_per_token": value * len(lengths) / sum(lengths)}


def _samples(arms: Mapping[str, Arm], count: int) -> list[dict[str, Any]]:
    """Before and after for the first prompts, first draw of each: not picked for their reward."""
    samples = []
    prompts = arms["raw"].rollout.prompts
    for index, prompt in enumerate(prompts[:count]):
        sample: dict[str, Any] = {"prompt": prompt}
        for name, arm in arms.items():
            rewrite = arm.rollout.rewrites[index][0]
            if arm.adds:
                sample[f"rewrite_{name}"] = rewrite.text
            sample[f"response_{name}"] = rewrite.responses[0].text
            sample[f"reward_{name}"] = arm.rewards[index][0]
        samples.append(sample)
    return samples
