"""The numbers of a report as tables of text, which the terminal and the page both show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.evaluate.results import Comparison, Evaluation, JudgeResult, Report, SafetyResult
from alignpro.report.words import (
    arm_title,
    comparison_titles,
    in_order,
    interval,
    is_number,
    mebibytes,
    number,
    paired_of,
    share,
    share_interval,
)
from alignpro.types import Usage


@dataclass(frozen=True)
class Grid:
    """A table: the first column names the row, the others hold numbers or nothing."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None  # the row to read first
    faint: frozenset[int] = frozenset()  # rows to doubt

    def __bool__(self) -> bool:
        return bool(self.rows)


def arms_grid(evaluation: Evaluation) -> Grid:
    arms = in_order(evaluation.arms)
    components = list(dict.fromkeys(name for arm in arms.values() for name in arm.components))
    if len(components) == 1:  # the reward itself
        components = []
    rows = [
        [
            arm_title(key),
            number(arm.reward.mean),
            interval(arm.reward.ci95),
            number(arm.reward_variance),
            *(number(arm.components.get(name)) for name in components),
            str(arm.n),
        ]
        for key, arm in arms.items()
    ]
    header = ["arm", "mean reward", "95% interval", "variance", *components, "prompts"]
    strong = list(arms).index("trained") if "trained" in arms else None
    return Grid("Held-out prompts", header, rows, strong)


def texts_grid(evaluation: Evaluation) -> Grid:
    """What the arms wrote: lengths, copying, cuts, the share of rewrites that are one text, answers
    in rewrites, broken guards, empty rewrites; no column of nothing."""
    arms = in_order(evaluation.arms)
    columns = {
        "response tokens": {key: number(arm.response_tokens, 1) for key, arm in arms.items()},
        "rewrite tokens": {key: number(arm.rewrite_tokens, 1) for key, arm in arms.items()},
        "copy rate": {key: share(arm.copy_rate) for key, arm in arms.items()},
        "cut responses": {key: share(arm.truncated_responses) for key, arm in arms.items()},
        "one text": {key: share(arm.common_rewrite) for key, arm in arms.items()},
        "hold the answer": {key: share(arm.leaked_answers) for key, arm in arms.items()},
    }
    if any(arm.broken_guards for arm in arms.values()):
        columns["break a guard"] = {
            key: share(None if arm.broken_guards is None else sum(arm.broken_guards.values()))
            for key, arm in arms.items()
        }
    if any(arm.empty_rewrites for arm in arms.values()):
        columns["empty rewrites"] = {key: str(arm.empty_rewrites) for key, arm in arms.items()}
    shown = {title: column for title, column in columns.items() if any(column.values())}
    rows = [[arm_title(key), *(column[key] for column in shown.values())] for key in arms]
    return Grid("What the arms wrote", ["arm", *shown], rows)


def paired_grid(evaluation: Evaluation) -> Grid:
    rows = [
        [arm_title(key), number(d.mean, sign=True), interval(d.ci95, sign=True)]
        for key, d in paired_of(evaluation).items()
    ]
    header = ["trained prompter minus", "reward per prompt", "95% interval"]
    return Grid("Paired differences", header, rows)


def judge_grid(judge: JudgeResult) -> Grid:
    """Win rates, plain and at equal length, a column for each comparison; a tie counts as half."""
    titles = [comparison_titles(name) for name in judge.comparisons]
    header = ["comparison", *(f"{left} against {right}" for left, right in titles)]
    if len({left for left, _ in titles}) == 1:
        header = [f"{titles[0][0]} against", *(right for _, right in titles)]
    lines: list[tuple[str, Callable[[Comparison], str]]] = [
        ("win rate", lambda c: share(c.win_rate)),
        ("95% interval", lambda c: share_interval(c.ci95)),
        ("at equal length", lambda c: share(c.length_controlled_win_rate)),
        ("95% interval", lambda c: share_interval(c.length_controlled_ci95)),
        ("wins", lambda c: str(c.wins)),
        ("ties", lambda c: str(c.ties)),
        ("losses", lambda c: str(c.losses)),
        ("differ by order", lambda c: str(c.order_disagreements)),
        ("shown first, chosen", lambda c: share(c.first_chosen)),
        ("without a verdict", lambda c: str(c.errors)),
        ("longer by, characters", lambda c: number(c.mean_length_difference, 1, sign=True)),
    ]
    rows = [[title, *(shown(c) for c in judge.comparisons.values())] for title, shown in lines]
    return Grid("The judge", header, [row for row in rows if any(row[1:])], strong=0)


def safety_grid(safety: SafetyResult) -> Grid:
    """Harm on marked prompts, refusals and reward on the others."""
    rows = [
        [
            arm_title(key),
            share(arm.harm_rate.mean),
            share_interval(arm.harm_rate.ci95),
            share(arm.in_zone),
            "none" if arm.calls is None else number(arm.calls, 1),
            share(arm.refusals),
            number(arm.ordinary_reward.mean),
        ]
        for key, arm in in_order(safety.arms).items()
    ]
    in_zone = f"prompts at {share(safety.zone)} or more"
    header = ["arm", "harmful", "95% interval", in_zone, "calls to the first", "refused", "reward"]
    title = (
        f"Harm on {safety.marked} marked prompts; refusals and reward on {safety.ordinary} others"
    )
    return Grid(title, header, rows)


def paired_safety_grid(safety: SafetyResult) -> Grid:
    rows = [
        [
            " - ".join(map(arm_title, key.split("_minus_"))),
            number(harm.mean, sign=True),
            interval(harm.ci95, sign=True),
            number(safety.paired_reward[key].mean, sign=True),
            interval(safety.paired_reward[key].ci95, sign=True),
        ]
        for key, harm in safety.paired_harm.items()
    ]
    header = ["difference", "harm", "95% interval", "ordinary reward", "95% interval"]
    return Grid("Paired differences of harm, and of reward on ordinary prompts", header, rows)


def jailbreak_words(safety: SafetyResult) -> list[str]:
    """What the theory says for the counts that were given."""
    j = safety.jailbreak
    if j is None:
        return []
    return [
        f"In theory, for the counts that were given: harmful zone {share(j.volume)} of the "
        f"simplex, {share(j.expanded_volume)} within {j.epsilon:g} of it; an adversary finds a "
        f"jailbreak with probability {share(j.least_probability)} or more (gamma {j.gamma:g}, "
        "assumed)."
    ]


def judge_facts(judge: JudgeResult) -> list[tuple[str, str]]:
    return [
        ("questions", str(judge.questions)),
        ("of them replayed", str(judge.replayed)),
        ("without a verdict", str(judge.failed)),
    ]


def usage_words(usage: Usage) -> str:
    cost = "" if usage.cost is None else f", cost {usage.cost:.4g}"
    return f"{usage.input_tokens:,} tokens read, {usage.output_tokens:,} written{cost}"


def costs(report: Report, metrics: Sequence[Mapping[str, Any]] = ()) -> list[tuple[str, str]]:
    """(name, value with its unit) of what the run cost."""
    evaluation, bound, headroom = report.evaluation, report.bound, report.headroom

    def total(name: str) -> float | None:
        known = [m[name] for m in metrics if is_number(m.get(name))]
        return sum(known) if known else None

    rows = []
    if evaluation is not None and evaluation.kl_per_rewrite is not None:
        rows.append(("KL per rewrite", f"{evaluation.kl_per_rewrite:.3f} nats"))
        rows.append(("KL per token", f"{number(evaluation.kl_per_token)} nats"))
    for name, tokens in (
        ("generated in training", total("generated_tokens")),
        ("of them the target's", total("target_tokens")),
    ):
        if tokens is not None:
            rows.append((name, f"{tokens:,.0f} tokens"))
    used = [Usage(**m["target_usage"]) for m in metrics if m.get("target_usage")]
    for name, usage in (
        ("target in training", sum(used, Usage()) if used else None),
        ("target in the evaluation", None if evaluation is None else evaluation.target_usage),
        ("target in the headroom", None if headroom is None else headroom.target_usage),
        ("target in the bound", None if bound is None else bound.target_usage),
        ("judge", None if evaluation is None or not evaluation.judge else evaluation.judge.usage),
    ):
        if usage is not None:
            rows.append((name, usage_words(usage)))
    broken: Counter[str] = Counter()
    for row in metrics:
        broken.update(row.get("broken_guards") or {})
    if broken:
        which = ", ".join(f"{name} {count:,}" for name, count in broken.most_common())
        rows.append(("broke a guard in training", f"{broken.total():,} rewrites ({which})"))
    for name, responses in (
        ("failed in training", total("failed_responses")),
        ("without a score in training", total("unscored_responses")),
        ("failed in the evaluation", None if evaluation is None else evaluation.failed_responses),
        (
            "without a score in the evaluation",
            None if evaluation is None else evaluation.unscored_responses,
        ),
    ):
        if responses:
            rows.append((name, f"{responses:,} responses, left out"))
    if evaluation is not None:
        rows.append(("generation", f"{evaluation.tokens_per_second:,.0f} tokens/s"))
    if report.peak_rss_bytes is not None:
        rows.append(("peak memory", mebibytes(report.peak_rss_bytes)))
    return rows + [(f"{stage} stage", f"{s:.1f} s") for stage, s in report.seconds.items()]
