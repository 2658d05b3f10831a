"""What a reader should doubt in a run: a pure function of its report and its metrics.

Every threshold stands here with its reason, and every finding names what was measured and where
the line is. A number that is absent is no finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignpro.evaluate.results import ArmResult, BoundReport, Comparison, Headroom, Report
from alignpro.report.words import (
    arm_title,
    comparison_titles,
    interval,
    is_number,
    number,
    share,
)

# Nats. The prompter then favours its average token exp(0.5) = 1.6 times as much as the reference
# does: far from the distribution that the KL penalty is to keep.
KL_PER_TOKEN = 0.5
# Share of the length. Judges and reward models pay for length alone; a quarter is past chance in
# a mean over some dozens of prompts.
LENGTH_DRIFT = 0.25
# Share of the rewrite that repeats the prompt: then the prompter hands on the prompt more than it
# writes anything.
COPY_RATE = 0.5
# Standard deviations of the held-out reward between the last training steps and the held-out
# mean: a quarter is past what a harder draw of prompts explains. The training mean must lie above
# the held-out interval as well.
OVERFITTING = 0.25
# Points of win rate: more than this of the wins went to length.
LENGTH_BIAS = 0.05
# Rewrites a prompt: fewer means that the forecast rests on one or two of them.
EFFECTIVE_SAMPLES = 3.0
# Share of the steps with at least one group of equal rewards, which teaches nothing.
ZERO_ADVANTAGE_STEPS = 0.5
# Share of the rewrites of the last steps that were cut at max_new_tokens: the reward then judges
# halves of sentences, and the length cannot shrink by learning to end.
TRUNCATED = 0.25
# Share of the comparisons in which the judge's choice changes with the order: one that goes by
# position alone changes every time, one that tosses a coin half the time.
ORDER_DISAGREEMENTS = 0.25
# "The last steps": this share of the rows, and no fewer than a handful.
LAST_SHARE, LAST_FEWEST = 0.1, 5


class Finding(NamedTuple):
    key: str  # stable name of the rule
    text: str  # one or two sentences with the number, the threshold and the reason


def find_warnings(report: Report, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings in the order of reading. metrics: rows of metrics.jsonl, which may lack any part."""
    steps = [row for row in metrics if is_number(row.get("step"))]
    evaluation = report.evaluation
    arms = {} if evaluation is None else evaluation.arms
    judge = None if evaluation is None else evaluation.judge
    return [
        *_kl(None if evaluation is None else evaluation.kl_per_token, steps),
        *_lengths(arms),
        *_copying(arms),
        *_overfitting(arms, steps),
        *_judge({} if judge is None else judge.comparisons),
        *_headroom(report.headroom),
        *_bound(report.bound),
        *_parity(report.config, steps),
        *_zero_advantage(steps),
        *_truncated(report.config, steps),
    ]


def _kl(per_token: float | None, steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    value = _mean(_last(steps), "kl_per_token") if per_token is None else per_token
    if value is None or value <= KL_PER_TOKEN:
        return []
    return [
        Finding(
            "kl_per_token",
            f"KL per token is {number(value, 2)} nats, above {KL_PER_TOKEN:g}: the trained "
            "prompter has gone far from the reference. A larger kl_coef holds it nearer.",
        )
    ]


def _lengths(arms: Mapping[str, ArmResult]) -> list[Finding]:
    if "trained" not in arms:
        return []
    responses = {key: arm.response_tokens for key, arm in arms.items()}
    rewrites = {key: arm.rewrite_tokens for key, arm in arms.items()}
    return [
        *_drift("responses", responses, ("raw", "untuned")),
        *_drift("rewrites", rewrites, ("untuned",)),
    ]


def _drift(what: str, lengths: Mapping[str, float | None], others: Sequence[str]) -> list[Finding]:
    """By how much the trained arm's mean length is another than those of the others."""
    length, drifts = lengths["trained"], []
    for other in others:
        base = lengths.get(other)
        drift = length / base - 1 if base and length is not None else 0.0
        if abs(drift) > LENGTH_DRIFT:
            way = "longer" if drift > 0 else "shorter"
            drifts.append(f"{share(abs(drift))} {way} than those of the {arm_title(other)}")
    if not drifts:
        return []
    return [
        Finding(
            f"{what}_length",
            f"The trained prompter's {what} are {' and '.join(drifts)}, past "
            f"{share(LENGTH_DRIFT)}: part of the reward may be a reward for length.",
        )
    ]


def _copying(arms: Mapping[str, ArmResult]) -> list[Finding]:
    rate = arms["trained"].copy_rate if "trained" in arms else None
    if rate is None or rate <= COPY_RATE:
        return []
    return [
        Finding(
            "copy_rate",
            f"The trained prompter's copy rate is {share(rate)}, above {share(COPY_RATE)}: its "
            "rewrites repeat the prompt more than they add to it.",
        )
    ]


def _overfitting(
    arms: Mapping[str, ArmResult], steps: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    training = _mean(_last(steps), "reward_mean")
    if training is None or "trained" not in arms:
        return []
    reward, margin = arms["trained"].reward, OVERFITTING * arms["trained"].reward_variance ** 0.5
    if training <= reward.high or training - reward.mean <= margin:
        return []
    return [
        Finding(
            "overfitting",
            f"Held-out reward is {number(reward.mean)} ({interval(reward.ci95)}) against "
            f"{number(training)} in the last training steps, more than {OVERFITTING:g} standard "
            "deviations apart: the gain may not carry over to new prompts.",
        )
    ]


def _judge(comparisons: Mapping[str, Comparison]) -> list[Finding]:
    found = []
    for name, row in comparisons.items():
        left, right = comparison_titles(name)
        left = left[:1].upper() + left[1:]
        plain, controlled = row.win_rate, row.length_controlled_win_rate
        if plain is not None and controlled is not None and plain - controlled > LENGTH_BIAS:
            found.append(
                Finding(
                    "length_controlled_win_rate",
                    f"{left} against {right}: the win rate falls from {share(plain)} to "
                    f"{share(controlled)} at equal length, by more than "
                    f"{100 * LENGTH_BIAS:.0f} points. The judge pays for length.",
                )
            )
        disagreeing = row.order_disagreements / max(row.n, 1)
        if disagreeing > ORDER_DISAGREEMENTS:
            found.append(
                Finding(
                    "order_disagreements",
                    f"{left} against {right}: the judge changes its mind with the order in "
                    f"{share(disagreeing)} of the comparisons, above "
                    f"{share(ORDER_DISAGREEMENTS)}. Position decides those, not the response.",
                )
            )
    return found


def _headroom(headroom: Headroom | None) -> list[Finding]:
    if headroom is None:
        return []
    point = headroom.recommended
    if point is None:
        text = (
            "No kl_coef of the headroom's grid is supported by its samples: the forecast rests on "
            "one or two rewrites a prompt. Draw more rewrites."
        )
        return [Finding("effective_samples", text)]
    if point.effective_samples >= EFFECTIVE_SAMPLES:
        return []
    return [
        Finding(
            "effective_samples",
            f"At the recommended kl_coef {point.kl_coef:g} the forecast rests on "
            f"{number(point.effective_samples, 1)} effective rewrites a prompt of "
            f"{headroom.num_rewrites}, fewer than {EFFECTIVE_SAMPLES:g}: it is noisy, and biased. "
            "Draw more rewrites.",
        )
    ]


def _bound(bound: BoundReport | None) -> list[Finding]:
    if bound is None or bound.holds:
        return []
    text = "The measured gap is larger than the bound: a term or the reward's range is wrong."
    return [Finding("bound", text)]


def _parity(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    # A null was not finite when it was written.
    off = [row["parity_max_abs"] for row in steps if row.get("parity_max_abs", 0.0) != 0.0]
    if not off:
        return []
    finite = [value for value in off if is_number(value)]
    largest = f"{max(finite):.3g}" if len(finite) == len(off) else "infinity or NaN"
    tuned = config.get("target") if config.get("policy") == "target" else None
    policy = tuned or config.get("prompter") or {}
    exact = policy.get("deterministic", True)
    expected = "0 is expected" if exact else "deterministic: false lets them"
    return [
        Finding(
            "parity",
            f"Sampled and scored log-probabilities differ in {len(off)} steps, by up to {largest}; "
            f"{expected}. The gradient is of another policy than the one that wrote.",
        )
    ]


def _zero_advantage(steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    counts = [
        row["zero_advantage_groups"] for row in steps if is_number(row.get("zero_advantage_groups"))
    ]
    if not counts:
        return []
    some = sum(count > 0 for count in counts) / len(counts)
    if some <= ZERO_ADVANTAGE_STEPS:
        return []
    return [
        Finding(
            "zero_advantage_groups",
            f"{share(some)} of the steps have groups whose rewards are all equal, above "
            f"{share(ZERO_ADVANTAGE_STEPS)}: those prompts teach nothing. More responses a "
            "rewrite, or a finer reward, tells them apart.",
        )
    ]


def _truncated(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    cut = total = 0.0
    for row in _last(steps):
        rewrites = _rewrites_of(row, config)
        if is_number(row.get("truncated_rewrites")) and rewrites:
            cut += row["truncated_rewrites"]
            total += rewrites
    if not total or cut / total <= TRUNCATED:
        return []
    return [
        Finding(
            "truncated_rewrites",
            f"{share(cut / total)} of the rewrites of the last steps are cut at max_new_tokens, "
            f"above {share(TRUNCATED)}: they end in the middle. Raise rewrite.max_new_tokens.",
        )
    ]


def _rewrites_of(row: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """How many rewrites a step drew: prompts x N by its configuration, else tokens / length."""
    train = config.get("train") or config  # a quickstart keeps its stages apart
    prompts, rewrites = train.get("prompts_per_step"), row.get("num_rewrites")
    if not is_number(rewrites):
        rewrites = train.get("num_rewrites")
    if is_number(prompts) and is_number(rewrites):
        return float(prompts * rewrites)
    tokens, length = row.get("tokens"), row.get("rewrite_tokens")
    if is_number(tokens) and is_number(length) and length > 0:
        return float(tokens / length)
    return None


def _last(steps: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return steps[-max(LAST_FEWEST, round(LAST_SHARE * len(steps))) :]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if is_number(row.get(name))]
    return sum(values) / len(values) if values else None
