"""What a reader should doubt in a run: a pure function of its report and its metrics.

Every threshold stands here with its reason, and every finding names what was measured and where
the line is. A number that is absent is no finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignpro.report.words import (
    arm_title,
    comparison_titles,
    interval,
    is_interval,
    is_number,
    number,
    recommended_point,
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


def find_warnings(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings in the order of reading.

    report: report.json, with ``headroom`` and ``bound`` where known. metrics: rows of
    metrics.jsonl. Both may lack any part.
    """
    steps = [row for row in metrics if is_number(row.get("step"))]
    return [
        *_kl(report, steps),
        *_lengths(report.get("arms") or {}),
        *_copying(report.get("arms") or {}),
        *_overfitting(report.get("arms") or {}, steps),
        *_judge(report.get("judge") or {}),
        *_headroom(report.get("headroom") or {}),
        *_bound(report.get("bound") or {}),
        *_parity(report.get("config") or {}, steps),
        *_zero_advantage(steps),
        *_truncated(report.get("config") or {}, steps),
    ]


def _kl(report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    value = report.get("kl_per_token")
    if not is_number(value):
        value = _mean(_last(steps), "kl_per_token")
    if value is None or value <= KL_PER_TOKEN:
        return []
    return [
        Finding(
            "kl_per_token",
            f"KL per token is {number(value, 2)} nats, above {KL_PER_TOKEN:g}: the trained "
            "prompter has gone far from the reference. A larger kl_coef holds it nearer.",
        )
    ]


def _lengths(arms: Mapping[str, Any]) -> list[Finding]:
    found = []
    trained = arms.get("trained") or {}
    for what, name, others in (
        ("responses", "response_tokens", ("raw", "untuned")),
        ("rewrites", "rewrite_tokens", ("untuned",)),
    ):
        drifts = []
        for other in others:
            length, base = trained.get(name), (arms.get(other) or {}).get(name)
            if is_number(length) and is_number(base) and base > 0:
                drift = length / base - 1
                if abs(drift) > LENGTH_DRIFT:
                    way = "longer" if drift > 0 else "shorter"
                    drifts.append(f"{share(abs(drift))} {way} than of the {arm_title(other)}")
        if drifts:
            text = (
                f"The trained prompter's {what} are {' and '.join(drifts)}, past "
                f"{share(LENGTH_DRIFT)}: part of the reward may be a reward for length."
            )
            found.append(Finding(f"{what}_length", text.replace("than of", "than those of")))
    return found


def _copying(arms: Mapping[str, Any]) -> list[Finding]:
    rate = (arms.get("trained") or {}).get("copy_rate")
    if not is_number(rate) or rate <= COPY_RATE:
        return []
    return [
        Finding(
            "copy_rate",
            f"The trained prompter's copy rate is {share(rate)}, above {share(COPY_RATE)}: its "
            "rewrites repeat the prompt more than they add to it.",
        )
    ]


def _overfitting(arms: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    trained, training = arms.get("trained") or {}, _mean(_last(steps), "reward_mean")
    mean, spread = trained.get("mean_reward"), trained.get("reward_variance")
    if training is None or not (is_number(mean) and is_number(spread) and spread > 0):
        return []
    margin = OVERFITTING * spread**0.5
    ci95 = trained.get("ci95")
    inside = is_interval(ci95) and training <= ci95[1]
    if inside or training - mean <= margin:
        return []
    return [
        Finding(
            "overfitting",
            f"Held-out reward is {number(mean)} ({interval(ci95)}) against {number(training)} in "
            f"the last training steps, more than {OVERFITTING:g} standard deviations apart: the "
            "gain may not carry over to new prompts.",
        )
    ]


def _judge(judge: Mapping[str, Any]) -> list[Finding]:
    found = []
    for name, row in (judge.get("comparisons") or {}).items():
        left, right = comparison_titles(name)
        left = left[:1].upper() + left[1:]
        plain, controlled = row.get("win_rate"), row.get("length_controlled_win_rate")
        if is_number(plain) and is_number(controlled) and plain - controlled > LENGTH_BIAS:
            found.append(
                Finding(
                    "length_controlled_win_rate",
                    f"{left} against {right}: the win rate falls from {share(plain)} to "
                    f"{share(controlled)} at equal length, by more than "
                    f"{100 * LENGTH_BIAS:.0f} points. The judge pays for length.",
                )
            )
        count, total = row.get("order_disagreements"), row.get("n")
        if is_number(count) and is_number(total) and total > 0:
            disagreeing = count / total
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


def _headroom(headroom: Mapping[str, Any]) -> list[Finding]:
    point = recommended_point(headroom)
    if point is None and headroom.get("frontier"):
        text = (
            "No kl_coef of the headroom's grid is supported by its samples: the forecast rests on "
            "one or two rewrites a prompt. Draw more rewrites."
        )
        return [Finding("effective_samples", text)]
    samples = None if point is None else point.get("effective_samples")
    if point is None or not is_number(samples) or samples >= EFFECTIVE_SAMPLES:
        return []
    of = headroom.get("num_rewrites")
    return [
        Finding(
            "effective_samples",
            f"At the recommended kl_coef {point['kl_coef']:g} the forecast rests on "
            f"{number(samples, 1)} effective rewrites a prompt"
            f"{f' of {of}' if is_number(of) else ''}, fewer than {EFFECTIVE_SAMPLES:g}: it is "
            "noisy, and biased. Draw more rewrites.",
        )
    ]


def _bound(bound: Mapping[str, Any]) -> list[Finding]:
    if bound.get("holds") is not False:
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
