"""The numbers of a report as tables of text, which the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.report.words import (
    arm_title,
    arms_of,
    comparison_titles,
    component_names,
    in_order,
    interval,
    is_number,
    mebibytes,
    number,
    paired_of,
    share,
    share_interval,
)


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


def arms_grid(report: Mapping[str, Any]) -> Grid:
    """Arms by row: mean reward with its 95% interval, variance, components, prompts."""
    components = component_names(report)
    arms = arms_of(report)
    rows = []
    for _, title, arm in arms:
        parts = arm.get("components") or {}
        rows.append(
            [
                title,
                number(arm["mean_reward"]),
                interval(arm["ci95"]),
                number(arm.get("reward_variance")),
                *(number(parts.get(name)) for name in components),
                str(arm.get("n", "")),
            ]
        )
    header = ["arm", "mean reward", "95% interval", "variance", *components, "prompts"]
    strong = next((i for i, (key, _, _) in enumerate(arms) if key == "trained"), None)
    return Grid("Held-out prompts", header, rows, strong)


def texts_grid(report: Mapping[str, Any]) -> Grid:
    """What the arms wrote: lengths, copying, empty rewrites; no column of nothing."""
    names = {
        "response_tokens": "response tokens",
        "rewrite_tokens": "rewrite tokens",
        "copy_rate": "copy rate",
        "empty_rewrites": "empty rewrites",
    }

    def shown(name: str, value: Any) -> str:
        if name == "copy_rate":
            return share(value)
        return number(value, 1 if name.endswith("_tokens") else 0)

    arms = arms_of(report)
    known = [name for name in names if any(arm.get(name) for _, _, arm in arms)]
    rows = [[title, *(shown(name, arm.get(name)) for name in known)] for _, title, arm in arms]
    header = ["arm", *(names[name] for name in known)]
    return Grid("What the arms wrote", header, rows if known else [])


def paired_grid(report: Mapping[str, Any]) -> Grid:
    """Trained minus every other arm, paired by prompt."""
    rows = [
        [arm_title(key), number(d["mean"], sign=True), interval(d["ci95"], sign=True)]
        for key, d in paired_of(report).items()
    ]
    header = ["trained prompter minus", "reward per prompt", "95% interval"]
    return Grid("Paired differences", header, rows)


def judge_grid(judge: Mapping[str, Any]) -> Grid:
    """Win rates, plain and at equal length, a column for each comparison; a tie counts as half."""
    comparisons = judge.get("comparisons") or {}
    titles = [comparison_titles(name) for name in comparisons]
    columns = list(comparisons.values())
    header = ["comparison", *(f"{left} against {right}" for left, right in titles)]
    if len({left for left, _ in titles}) == 1:
        header = [f"{titles[0][0]} against", *(right for _, right in titles)]

    def counts(key: str) -> list[str]:
        return [str(column[key]) if is_number(column.get(key)) else "" for column in columns]

    rows = [
        ["win rate", *(share(column.get("win_rate")) for column in columns)],
        ["95% interval", *(share_interval(column.get("ci95")) for column in columns)],
        ["at equal length", *(share(c.get("length_controlled_win_rate")) for c in columns)],
        ["95% interval", *(share_interval(c.get("length_controlled_ci95")) for c in columns)],
        ["wins", *counts("wins")],
        ["ties", *counts("ties")],
        ["losses", *counts("losses")],
        ["differ by order", *counts("order_disagreements")],
        ["shown first, chosen", *(share(column.get("first_chosen")) for column in columns)],
        ["without a verdict", *counts("errors")],
        [
            "longer by, characters",
            *(number(c.get("mean_length_difference"), 1, sign=True) for c in columns),
        ],
    ]
    return Grid("The judge", header, [row for row in rows if any(row[1:])], strong=0)


def judge_facts(judge: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, and how much of it got no verdict."""
    names = {
        "questions": "questions",
        "replayed": "of them replayed",
        "failed": "without a verdict",
    }
    return [(title, str(judge[key])) for key, title in names.items() if is_number(judge.get(key))]


def costs(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[str, str]]:
    """(name, value with its unit) of what the run cost."""
    rows = []
    if is_number(report.get("kl_per_rewrite")):
        rows.append(("KL per rewrite", f"{report['kl_per_rewrite']:.3f} nats"))
    if is_number(report.get("kl_per_token")):
        rows.append(("KL per token", f"{report['kl_per_token']:.3f} nats"))
    generated = [m["generated_tokens"] for m in metrics if is_number(m.get("generated_tokens"))]
    if generated:
        rows.append(("generated in training", f"{sum(generated):,.0f} tokens"))
    if is_number(report.get("tokens_per_second")):
        rows.append(("generation", f"{report['tokens_per_second']:,.0f} tokens/s"))
    if is_number(report.get("peak_rss_bytes")):
        rows.append(("peak memory", mebibytes(report["peak_rss_bytes"])))
    seconds = report.get("seconds") or {}
    rows += [(f"{stage} stage", f"{s:.1f} s") for stage, s in seconds.items() if is_number(s)]
    return rows


@dataclass(frozen=True)
class SampleArm:
    """What one arm made of a prompt; a text is None where the arm has none."""

    key: str
    title: str
    rewrite: str | None
    response: str | None
    reward: str  # as printed; "" where unknown


def sample_arms(sample: Mapping[str, Any]) -> list[SampleArm]:
    """The arms of a sample {prompt, rewrite_<arm>, response_<arm>, reward_<arm>}, in order."""
    keys = {
        key.partition("_")[2]: None
        for key, value in sample.items()
        if key.startswith(("rewrite_", "response_")) and value is not None
    }
    return [
        SampleArm(
            key,
            arm_title(key),
            sample.get(f"rewrite_{key}"),
            sample.get(f"response_{key}"),
            number(sample.get(f"reward_{key}")),
        )
        for key in in_order(keys)
    ]
