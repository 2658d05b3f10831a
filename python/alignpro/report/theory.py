"""Headroom and bound in the terminal: tables, and what they mean in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TERMS = {
    "tv_tuned": "TV of tuned and frozen target",
    "tv_rewrites": "TV of the target with and without untuned rewrites",
    "kl": "KL of the optimum to the untuned prompter (nats)",
}


def headroom_tables(headroom: Mapping[str, Any]) -> RenderableType:
    """The frontier by kl_coef, best-of-n, and the sentences of `headroom_words`."""
    return Group(
        frontier_table(headroom),
        best_of_n_table(headroom),
        Text("\n".join(headroom_words(headroom))),
    )


def frontier_table(headroom: Mapping[str, Any]) -> Table:
    """The optimum by kl_coef; rows whose samples do not support the estimate are dim."""
    table = Table(
        title="Optimum by kl_coef, before training",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),  # eight columns in 80 characters
    )
    for title in (
        "kl_coef", "objective", "95% interval", "corrected", "cross-fit", "reward", "KL", "samples",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    recommended = headroom["recommended_kl_coef"]
    for point in headroom["frontier"]:
        kl_coef = point["kl_coef"]
        unsupported = recommended is None or kl_coef < recommended
        table.add_row(
            f"{kl_coef:g}",
            _number(point["objective"]),
            _interval(point["objective_ci95"]),
            _number(point["corrected_objective"]),
            _number(point["crossfit_objective"]),
            _number(point["reward"]),
            f"{point['kl']:.2f}",
            f"{point['effective_samples']:.1f}",
            style="bold" if kl_coef == recommended else "dim" if unsupported else None,
        )
    return table


def best_of_n_table(headroom: Mapping[str, Any]) -> Table:
    """The best of 1, 2, 4, ... and all rewrites, for reference."""
    table = Table(title="Best of n rewrites", title_justify="left")
    for title in ("n", "reward", "cross-fitted", "KL at most"):
        table.add_column(title, justify="right")
    for best in headroom["best_of_n"]:
        n = best["n"]
        if n & (n - 1) == 0 or n == headroom["num_rewrites"]:
            table.add_row(
                str(n),
                _number(best["reward"]),
                _number(best["crossfit_reward"]),
                f"{best['kl']:.2f}",
            )
    return table


def headroom_words(headroom: Mapping[str, Any]) -> list[str]:
    """What there is to gain, at which KL, and how far to trust it: one sentence each."""
    n, m = headroom["num_rewrites"], headroom["num_responses"]
    low, high = headroom["untuned_ci95"]
    lines = [
        f"Untuned prompter: reward {headroom['untuned_reward']:.3f} ({low:.3f} to {high:.3f}), "
        f"{headroom['num_prompts']} prompts x {n} rewrites x {m} responses."
    ]
    variance = headroom["variance"]
    if variance is not None:
        between, within = max(variance["between_rewrites"], 0.0), variance["within_rewrite"]
        share = between / (between + within) if between + within > 0 else 0.0
        lines.append(
            f"Of a reward's variance given the prompt, {share:.0%} lies between rewrites; the rest "
            "is the target's own noise."
        )
    point = next(
        (p for p in headroom["frontier"] if p["kl_coef"] == headroom["recommended_kl_coef"]), None
    )
    if point is None:
        lines.append(
            f"No kl_coef of the grid leaves a third of {n} rewrites effective: every estimate "
            "rests on one or two rewrites a prompt. Ask for more rewrites or larger kl_coefs."
        )
        return lines
    untuned = headroom["untuned_reward"]
    lines.append(
        f"Smallest kl_coef that these samples support: {point['kl_coef']:g} "
        f"({point['effective_samples']:.1f} of {n} rewrites effective). Forecast of the objective "
        f"there: {untuned:.3f} (untuned) to {point['objective_ci95'][1]:.3f} (the upper end)."
    )
    crossfit = point["crossfit_objective"]
    if crossfit is None:
        lines.append(
            "With one response a rewrite, the target's noise makes the upper end too high."
        )
    elif crossfit > untuned:
        lines.append(
            f"Choosing among {n} rewrites by {m - 1} response(s) reaches {crossfit:.3f} without "
            f"training; {point['corrected_objective']:.3f} is the estimate corrected for noise."
        )
    else:
        lines.append(
            f"Choosing among {n} rewrites by {m - 1} response(s) is not worth its KL "
            f"({crossfit:.3f}): too few to tell rewrites apart. {point['corrected_objective']:.3f} "
            "is the estimate corrected for noise."
        )
    if any(p["kl_coef"] < point["kl_coef"] for p in headroom["frontier"]):
        lines.append(
            f"Dim rows rest on one or two rewrites a prompt: {n} rewrites show no KL above "
            f"log {n} = {log(n):.2f}, and training can go further than they say."
        )
    return lines


def bound_tables(bound: Mapping[str, Any]) -> RenderableType:
    """Every term with its interval, the rewards, and the sentences of `bound_words`."""
    table = Table(title="Bound on the gap to a tuned target", title_justify="left")
    for title in ("term", "mean", "95% interval"):
        table.add_column(title, justify="left" if title == "term" else "right")
    rows = [(title, bound["terms"][key]) for key, title in _TERMS.items()]
    rows += [
        ("bound", bound["bound"]),
        ("measured gap, tuned target - prompted optimum", bound["measured_gap"]),
        ("bound - measured gap", bound["slack"]),
    ]
    if bound["trained_gap"] is not None:
        rows.append(("measured gap, tuned target - trained prompter", bound["trained_gap"]))
    for title, value in rows:
        style = "bold" if title == "bound" else None
        table.add_row(title, _number(value["mean"]), _interval(value["ci95"]), style=style)
    rewards = Table(title="Rewards", title_justify="left")
    for title in ("of", "mean", "95% interval"):
        rewards.add_column(title, justify="left" if title == "of" else "right")
    for name, value in bound["rewards"].items():
        rewards.add_row(Text(name), _number(value["mean"]), _interval(value["ci95"]))
    return Group(table, rewards, Text("\n".join(bound_words(bound))))


def bound_words(bound: Mapping[str, Any]) -> list[str]:
    """Whether it holds, whether it says anything, and what it rests on: one sentence each."""
    low, high = bound["reward_range"]
    mean, gap = bound["bound"]["mean"], bound["measured_gap"]["mean"]
    width = high - low
    lines = [
        f"The bound {'holds' if bound['holds'] else 'DOES NOT HOLD'}: measured gap {gap:.3f}, "
        f"bound {mean:.3f}."
    ]
    if bound["vacuous"]:
        lines.append(f"It is vacuous: rewards span {width:.3f}, so no gap can exceed that anyway.")
    else:
        lines.append(f"It is not vacuous: rewards span {width:.3f}.")
    if bound["reward_range_source"] == "observed":
        lines.append(
            f"The range {low:.3f} to {high:.3f} is what was observed, and so too narrow if "
            "anything; give reward_range to have the true one."
        )
    if bound["closed_form"] is not None:
        closed = bound["closed_form"]
        lines.append(
            f"The tuned target is the closed-form optimum at kl_coef {closed['kl_coef']:g}, from "
            f"{closed['effective_samples']:.1f} effective responses a prompt: its reward and total "
            "variation are too low if anything."
        )
    if bound["num_responses"] < 2:
        lines.append(
            "With one response a rewrite, the target's noise makes the KL and the reward of the "
            "prompted optimum too high, and so bound and gap too small."
        )
    if bound["truncated_responses"] > 0:
        lines.append(
            f"{bound['truncated_responses']:.0%} of the responses were cut off at the last allowed "
            "token: the total variation is that of the process so truncated, as is the reward."
        )
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
