"""One line of the metrics log, from a step's rollout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal

import torch

from alignpro.findings import diversity
from alignpro.train.adaptive import variance_split
from alignpro.train.trajectories import StepBatch
from alignpro.types import Rollout, Usage


def rollout_row(
    rollout: Rollout, batch: StepBatch, policy: Literal["prompter", "target"]
) -> dict[str, Any]:
    """What was sampled, in raw numbers; None where one is not known.

    With policy "target" there are no rewrites: the policy writes the responses.
    """
    rewrites = [w for group in rollout.rewrites for w in group]
    responses = [r for w in rewrites for r in w.responses]
    rewards = torch.tensor([r.reward for r in responses], dtype=torch.float64)
    several = len(responses) > 1
    row: dict[str, Any] = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()) if several else None,
        "reward_variance": float(rewards.var()) if several else None,
        "num_rewrites": max(len(group) for group in rollout.rewrites),
        "num_responses": 1,
        "zero_advantage_groups": batch.zero_advantage_groups,
        "failed_responses": len(rollout.failed),
        "unscored_responses": rollout.unscored,
        "scored_responses": len(responses),
        "response_tokens": _mean(r.num_tokens for r in responses),
        "truncated_responses": sum(r.finish_reason == "length" for r in responses),
        "kept_mass": _mean(mass for r in responses for mass in r.kept_mass),
        "sample": responses[0].text if responses else "",
        # What was written: rewrites may share a response that was drawn once.
        "target_tokens": rollout.generated_tokens
        - (sum(len(w.tokens) for w in rewrites) if policy == "prompter" else 0),
        "generated_tokens": rollout.generated_tokens,
        "tokens_per_second": rollout.generated_tokens / max(rollout.seconds["generate"], 1e-9),
    }
    if policy == "prompter":
        split = variance_split(rollout)
        distinct, common = diversity(rollout)
        row |= {
            "num_responses": max(len(w.responses) for w in rewrites),
            "variance_between": None if split is None else split.between_rewrites,
            "variance_within": None if split is None else split.within_rewrite,
            "rewrite_tokens": _mean(len(w.tokens) for w in rewrites),
            "truncated_rewrites": sum(w.finish_reason == "length" for w in rewrites),
            "distinct_rewrites": distinct,
            "common_rewrite": common,
            "empty_rewrites": sum(not w.text for w in rewrites),
            "reasoning_alone": sum(bool(w.reasoning) and not w.text for w in rewrites),
            "sample": rewrites[0].text,
        }
    else:
        row["num_rewrites"] = len(responses) // len(rollout.rewrites)
    # Rewrites of one text share their responses, which were paid for once.
    told = {id(r): r.usage for r in responses if r.usage is not None}.values()
    if told:
        row["target_usage"] = asdict(sum(told, Usage()))
    return row


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
