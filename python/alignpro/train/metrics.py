"""The metrics log: one JSON object a line, one line a step, on disk before the next step starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignpro.files import append_line, write_json_lines

_log = logging.getLogger(__name__)


class MetricText(NamedTuple):
    """One number of a row. ``tag``: what trackers call it, by group."""

    tag: str
    text: str


# Every number of a row, by its key: what trackers show, and the glossary of the pages.
METRICS = {
    "reward_mean": MetricText("reward/mean", "The mean reward of the step's responses."),
    "reward_std": MetricText("reward/std", "The standard deviation of these rewards."),
    "reward_variance": MetricText("reward/variance", "The variance of these rewards."),
    "heldout/reward_mean": MetricText(
        "reward/heldout", "The mean reward on the prompts of `heldout`, which are not trained on."
    ),
    "heldout/components": MetricText(
        "reward/heldout", "The same by the terms of a sum of rewards."
    ),
    "heldout": MetricText(
        "heldout",
        "What else was measured on held-out rows: lengths, copies, cut answers; metrics of pairs.",
    ),
    "expected_reward": MetricText(
        "reward/expected", "The mean reward that the fit of a pooled closed form expects."
    ),
    "variance_between": MetricText(
        "reward/variance_between", "The variance of the reward between rewrites of a prompt."
    ),
    "variance_within": MetricText(
        "reward/variance_within", "The variance of the reward between responses to one rewrite."
    ),
    "noise_variance": MetricText(
        "reward/noise_variance", "The variance of one response's reward that no text explains."
    ),
    "text_by_features_variance": MetricText(
        "reward/text_by_features_variance",
        "The variance of what a text is worth between kinds of prompts.",
    ),
    "zero_advantage_groups": MetricText(
        "reward/zero_advantage_groups", "Prompts whose rewrites all earned the same."
    ),
    "accuracy": MetricText(
        "preference/accuracy",
        "The share of pairs whose chosen answer has the higher reward; of equal ones, a half.",
    ),
    "margin": MetricText(
        "preference/margin", "The mean reward of the chosen answers above that of the rejected."
    ),
    "chosen_reward": MetricText(
        "preference/chosen_reward",
        "Beta times the chosen answers' mean log-ratio of policy to reference.",
    ),
    "rejected_reward": MetricText(
        "preference/rejected_reward", "The same of the rejected answers."
    ),
    "chosen_logprob": MetricText(
        "preference/chosen_logprob", "The mean log-probability of a chosen answer, in nats."
    ),
    "rejected_logprob": MetricText(
        "preference/rejected_logprob", "The mean log-probability of a rejected answer, in nats."
    ),
    "chosen_tokens": MetricText(
        "preference/chosen_tokens", "The mean length of a chosen answer in tokens."
    ),
    "rejected_tokens": MetricText(
        "preference/rejected_tokens", "The mean length of a rejected answer in tokens."
    ),
    "kl_coef": MetricText("kl/coef", "The weight of the KL penalty in this step."),
    "kl_per_rewrite": MetricText(
        "kl/per_rewrite", "The exact KL(prompter || reference), in nats per rewrite."
    ),
    "kl_per_token": MetricText("kl/per_token", "The same KL, in nats per token."),
    "kl_anchored": MetricText(
        "kl/anchored",
        "The KL per rewrite where the reference reads an anchor, which is above 0 from the start.",
    ),
    "kl_plain": MetricText("kl/plain", "The KL per rewrite of the other prompts."),
    "k1_per_rewrite": MetricText(
        "kl/k1_per_rewrite", "The KL as estimated by the mean log-ratio, for comparison."
    ),
    "k3_per_rewrite": MetricText(
        "kl/k3_per_rewrite", "The KL as estimated by ratio - 1 - log ratio, for comparison."
    ),
    "kl_loss": MetricText("kl/loss", "The part of the loss that the KL penalty makes."),
    "tokens": MetricText("tokens/trained", "Tokens of rewrites that were trained on in the step."),
    "target_tokens": MetricText("tokens/target", "Tokens that the target wrote in the step."),
    "generated_tokens": MetricText(
        "tokens/generated", "Tokens that both models wrote in the step."
    ),
    "rewrite_tokens": MetricText("tokens/per_rewrite", "The mean length of a rewrite in tokens."),
    "response_tokens": MetricText(
        "tokens/per_response", "The mean length of a response in tokens."
    ),
    "truncated_rewrites": MetricText(
        "tokens/truncated_rewrites", "Rewrites that were cut at the most tokens allowed."
    ),
    "truncated_responses": MetricText(
        "tokens/truncated_responses", "Responses that were cut at the most tokens allowed."
    ),
    "kept_mass": MetricText(
        "tokens/kept_mass", "The mean probability that top-k, top-p and min-p kept of the target's."
    ),
    "target_usage": MetricText(
        "tokens/usage", "What a target behind an endpoint says that its answers took."
    ),
    "tokens_per_second": MetricText("time/tokens_per_second", "Tokens written in a second."),
    "seconds": MetricText("time", "Seconds of the step by stage; `step` is the whole of it."),
    "heldout/seconds": MetricText("time/heldout", "Seconds of the look at held-out prompts."),
    "loss": MetricText("loss/total", "The loss of the step."),
    "policy_loss": MetricText("loss/policy", "The part of the loss that the rewards make."),
    "value_loss": MetricText("loss/value", "The loss of the value head."),
    "entropy": MetricText("loss/entropy", "The prompter's entropy, in nats per token."),
    "grad_norm": MetricText("loss/grad_norm", "The norm of the gradient before it is clipped."),
    "learning_rate": MetricText("loss/learning_rate", "The learning rate of the step."),
    "updates": MetricText("loss/updates", "Optimizer steps in the step."),
    "micro_batches": MetricText("loss/micro_batches", "Micro-batches that the step was scored in."),
    "parity_max_abs": MetricText(
        "loss/parity_max_abs",
        "The largest difference between sampled and scored log-probabilities; 0 on the CPU.",
    ),
    "ratio_mean": MetricText(
        "loss/ratio_mean", "The mean ratio of the new probability of a token to the sampled one."
    ),
    "ratio_max": MetricText("loss/ratio_max", "The largest of these ratios."),
    "clip_fraction": MetricText("loss/clip_fraction", "The share of ratios that were clipped."),
    "epoch": MetricText("rewrites/epoch", "Passes over the prompts that were begun, less one."),
    "num_rewrites": MetricText("rewrites/per_prompt", "Rewrites of each prompt."),
    "num_responses": MetricText("rewrites/responses", "Responses to each rewrite."),
    "distinct_rewrites": MetricText("rewrites/distinct", "Different texts among the rewrites."),
    "common_rewrite": MetricText(
        "rewrites/common", "The share of the rewrites that the most frequent text has."
    ),
    "empty_rewrites": MetricText(
        "rewrites/empty", "Rewrites without text, which leave the prompt as it is."
    ),
    "reasoning_alone": MetricText(
        "rewrites/reasoning_alone", "Rewrites that were cut in their reasoning."
    ),
    "broken_guards": MetricText(
        "rewrites/broken_guards",
        "Rewrites that broke a guard, by the guard; each cost a penalty.",
    ),
    "scored_responses": MetricText("rewrites/scored_responses", "Responses that have a score."),
    "unscored_responses": MetricText(
        "rewrites/unscored_responses", "Responses that the reward gave no score (None)."
    ),
    "failed_responses": MetricText("rewrites/failed_responses", "Responses that were left out."),
}


def tag_of(name: str) -> str:
    """What trackers call a number of a row ("seconds/reward" is "time/reward"); a name that is not
    in `METRICS` is of the group "other"."""
    if name in METRICS:
        return METRICS[name].tag
    group, slash, rest = name.rpartition("/")
    while slash and group not in METRICS:
        group, slash, more = group.rpartition("/")
        rest = f"{more}/{rest}"
    return f"{METRICS[group].tag}/{rest}" if group in METRICS else f"other/{name}"


class MetricsLog:
    """Appends rows to a JSONL file and flushes each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. NaN and infinities are written as null: JSON has no word for them."""
        append_line(self.path, json.dumps(_finite(row)))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log. A last line cut short by a crash is left out."""
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]}")
        rows.append(row)
    return rows


def truncate_metrics(path: str | Path, *, steps: int) -> None:
    """Drop the rows of steps at or after ``steps``: what a resumed run writes again."""
    path = Path(path)
    rows = [row for row in read_metrics(path) if row["step"] < steps] if path.exists() else []
    if len(rows) < steps:
        gone = steps - len(rows)
        _log.warning("%s: the rows of %d of the first %d steps are gone", path, gone, steps)
    if path.exists():
        write_json_lines(path, rows)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
