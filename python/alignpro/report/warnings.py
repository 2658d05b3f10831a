"""What a reader should doubt in a run: a pure function of its report and its metrics.

What the trained prompter writes is judged by `findings`, as in training. Every other threshold
stands here with its reason, and every finding names what was measured and where
the line is. A number that is absent is no finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignpro.evaluate.results import ArmResult, BoundReport, Comparison, Headroom, Report
from alignpro.findings import (
    ONE_REWRITE,
    TRUNCATED,
    Finding,
    arm_findings,
    one_rewrite,
    slow_rows,
    truncated_rewrites,
)
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
# Share of the comparisons in which the judge's choice changes with the order: one that goes by
# position alone changes every time, one that tosses a coin half the time.
ORDER_DISAGREEMENTS = 0.25
# "The last steps": this share of the rows, and no fewer than a handful.
LAST_SHARE, LAST_FEWEST = 0.1, 5


# Of metrics.jsonl.
Rows = Sequence[Mapping[str, Any]]


def find_warnings(report: Report, metrics: Rows) -> list[Finding]:
    """Findings in the order of reading. metrics: rows of metrics.jsonl, which may lack any part."""
    steps = [row for row in metrics if is_number(row.get("step"))]
    evaluation = report.evaluation
    arms = {} if evaluation is None else evaluation.arms
    judge = None if evaluation is None else evaluation.judge
    return [
        *_too_long(report, steps),
        *_kl(None if evaluation is None else evaluation.kl_per_token, steps),
        *_written(arms, report.config, steps),
        *_overfitting(arms.get("trained"), steps),
        *_judge({} if judge is None else judge.comparisons),
        *_headroom(None if report.headroom is None else report.headroom.headroom),
        *_bound(report.bound),
        *_parity(report.config, steps),
        *_zero_advantage(steps),
        *_slow_rows(report.config),
    ]


def _too_long(report: Report, steps: Rows) -> Iterator[Finding]:
    of_training = steps[0].get("too_long") if steps else None
    for part, where in (
        (of_training, "training"),
        (report.evaluation and report.evaluation.too_long, "the evaluation"),
        (report.headroom and report.headroom.too_long, "the headroom"),
        (report.bound and report.bound.too_long, "the bound"),
    ):
        if part:
            yield Finding("too_long", f"In {where}, {part}.")


def _kl(per_token: float | None, steps: Rows) -> Iterator[Finding]:
    value = _mean(_last(steps), "kl_per_token") if per_token is None else per_token
    if value is not None and value > KL_PER_TOKEN:
        yield Finding(
            "kl_per_token",
            f"KL per token is {number(value, 2)} nats, above {KL_PER_TOKEN:g}: the trained "
            "prompter has gone far from the reference. A larger kl_coef holds it nearer.",
        )


def _written(
    arms: Mapping[str, ArmResult], config: Mapping[str, Any], steps: Rows
) -> Iterator[Finding]:
    """What the trained prompter writes: by its arm, and by the steps where that does not say."""
    since, trained = _one_rewrite_since(steps), arms.get("trained")
    if trained is not None:
        before = {arm_title(key): arms[key] for key in ("raw", "untuned") if key in arms}
        yield from arm_findings(trained, before, since=since)
    if since is not None and (trained is None or trained.common_rewrite is None):
        yield one_rewrite(steps[-1]["common_rewrite"], "the rewrites of a step", since)
    if trained is None or trained.truncated_rewrites is None:
        yield from _truncated(config, steps)


def _one_rewrite_since(steps: Rows) -> int | None:
    """The step from which on nearly all rewrites of a step are one text."""
    since = None
    for row in reversed(steps):
        if not is_number(row.get("common_rewrite")) or row["common_rewrite"] <= ONE_REWRITE:
            break
        since = int(row["step"])
    return since


def _overfitting(trained: ArmResult | None, steps: Rows) -> Iterator[Finding]:
    training = _mean(_last(steps), "reward_mean")
    if training is None or trained is None:
        return
    reward, margin = trained.reward, OVERFITTING * trained.reward_variance**0.5
    if training > reward.high and training - reward.mean > margin:
        yield Finding(
            "overfitting",
            f"Held-out reward is {number(reward.mean)} ({interval(reward.ci95)}) against "
            f"{number(training)} in the last training steps, more than {OVERFITTING:g} standard "
            "deviations apart: the gain may not carry over to new prompts.",
        )


def _judge(comparisons: Mapping[str, Comparison]) -> Iterator[Finding]:
    for name, row in comparisons.items():
        left, right = comparison_titles(name)
        sides = f"{left[:1].upper()}{left[1:]} against {right}"
        plain, controlled = row.win_rate, row.length_controlled_win_rate
        if plain is not None and controlled is not None and plain - controlled > LENGTH_BIAS:
            yield Finding(
                "length_controlled_win_rate",
                f"{sides}: the win rate falls from {share(plain)} to {share(controlled)} at equal "
                f"length, by more than {100 * LENGTH_BIAS:.0f} points. The judge pays for length.",
            )
        disagreeing = row.order_disagreements / max(row.n, 1)
        if disagreeing > ORDER_DISAGREEMENTS:
            yield Finding(
                "order_disagreements",
                f"{sides}: the judge changes its mind with the order in {share(disagreeing)} of "
                f"the comparisons, above {share(ORDER_DISAGREEMENTS)}. Position decides those, not "
                "the response.",
            )


def _headroom(headroom: Headroom | None) -> Iterator[Finding]:
    if headroom is None:
        return
    point = headroom.recommended
    if point is None:
        yield Finding(
            "effective_samples",
            "No kl_coef of the headroom's grid is supported by its samples: the forecast rests on "
            "one or two rewrites a prompt. Draw more rewrites.",
        )
    elif point.effective_samples < EFFECTIVE_SAMPLES:
        yield Finding(
            "effective_samples",
            f"At the recommended kl_coef {point.kl_coef:g} the forecast rests on "
            f"{number(point.effective_samples, 1)} effective rewrites a prompt of "
            f"{headroom.num_rewrites}, fewer than {EFFECTIVE_SAMPLES:g}: it is noisy, and biased. "
            "Draw more rewrites.",
        )


def _bound(bound: BoundReport | None) -> Iterator[Finding]:
    if bound is not None and not bound.holds:
        yield Finding(
            "bound",
            "The measured gap is larger than the bound: a term or the reward's range is wrong.",
        )


def _parity(config: Mapping[str, Any], steps: Rows) -> Iterator[Finding]:
    # A null was not finite when it was written.
    off = [row["parity_max_abs"] for row in steps if row.get("parity_max_abs", 0.0) != 0.0]
    if not off:
        return
    finite = [value for value in off if is_number(value)]
    largest = f"{max(finite):.3g}" if len(finite) == len(off) else "infinity or NaN"
    tuned = config.get("target") if config.get("policy") == "target" else None
    policy = tuned or config.get("prompter") or {}
    exact = policy.get("deterministic", True)
    expected = "0 is expected" if exact else "deterministic: false lets them"
    yield Finding(
        "parity",
        f"Sampled and scored log-probabilities differ in {len(off)} steps, by up to {largest}; "
        f"{expected}. The gradient is of another policy than the one that wrote.",
    )


def _slow_rows(config: Mapping[str, Any]) -> Iterator[Finding]:
    train = config.get("train") or config  # a quickstart keeps its stages apart
    yield from slow_rows(train.get("tuner"), train.get("learning_rate"))


def _zero_advantage(steps: Rows) -> Iterator[Finding]:
    key = "zero_advantage_groups"
    counts = [row[key] for row in steps if is_number(row.get(key))]
    some = sum(count > 0 for count in counts) / max(len(counts), 1)
    if some > ZERO_ADVANTAGE_STEPS:
        cut, answers = (sum(row.get(k) or 0 for row in steps) for k in _CUT_OF)
        remedy = "More responses a rewrite, or a finer reward, tells them apart."
        if answers and cut > TRUNCATED * answers:
            remedy = (
                f"{cut:,} of {answers:,} responses were cut at response.max_new_tokens, and what "
                "the reward looks for may not have come by then. Raise it."
            )
        yield Finding(
            key,
            f"{share(some)} of the steps have groups whose rewards are all equal, above "
            f"{share(ZERO_ADVANTAGE_STEPS)}: those prompts teach nothing. {remedy}",
        )


_CUT_OF = ("truncated_responses", "scored_responses")


def _truncated(config: Mapping[str, Any], steps: Rows) -> Iterator[Finding]:
    cut = total = 0.0
    for row in _last(steps):
        rewrites = _rewrites_of(row, config)
        if is_number(row.get("truncated_rewrites")) and rewrites:
            cut += row["truncated_rewrites"]
            total += rewrites
    if total:
        yield from truncated_rewrites(cut / total, "the rewrites of the last steps")


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


def _last(steps: Rows) -> Rows:
    return steps[-max(LAST_FEWEST, round(LAST_SHARE * len(steps))) :]


def _mean(rows: Rows, name: str) -> float | None:
    values = [float(row[name]) for row in rows if is_number(row.get(name))]
    return sum(values) / len(values) if values else None
