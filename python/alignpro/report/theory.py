"""Headroom and bound as a reader meets them: tables, and what they mean in plain words.

Any number may be absent: then the sentence that needs it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from rich.console import Group
from rich.text import Text

from alignpro.report.grids import Grid
from alignpro.report.tables import grid_table, toned
from alignpro.report.words import (
    Verdict,
    arm_title,
    interval,
    is_interval,
    is_number,
    number,
    printable,
    recommended_point,
    share,
)

_TERMS = {
    "tv_tuned": "TV of tuned and frozen target",
    "tv_rewrites": "TV of the target with and without untuned rewrites",
    "kl": "KL of the optimum to the untuned prompter (nats)",
}
_LINES = {
    "bound": "bound",
    "measured_gap": "measured gap, tuned target - prompted optimum",
    "slack": "bound - measured gap",
    "trained_gap": "measured gap, tuned target - trained prompter",
}


def headroom_tables(headroom: Mapping[str, Any]) -> Group:
    """The frontier by kl_coef, best-of-n, and the sentences of `headroom_words`."""
    grids = (frontier_grid(headroom), best_of_n_grid(headroom))
    words = Text("\n".join(printable(line) for line in headroom_words(headroom)))
    return Group(*(grid_table(grid) for grid in grids if grid), words)


def bound_tables(bound: Mapping[str, Any]) -> Group:
    """Every term with its interval, the rewards, and the sentences of `bound_words`."""
    grids = (bound_grid(bound), rewards_grid(bound))
    words = Text("\n").join(toned(said) for said in bound_verdicts(bound))
    return Group(*(grid_table(grid) for grid in grids if grid), words)


def frontier_grid(headroom: Mapping[str, Any]) -> Grid:
    """The optimum by kl_coef; rows whose samples do not support the estimate are faint."""
    header = [
        "kl_coef",
        "objective",
        "95% interval",
        "corrected",
        "cross-fit",
        "reward",
        "KL",
        "samples",
    ]
    points = headroom.get("frontier") or []
    best = recommended_point(headroom)
    rows = [
        [
            f"{point['kl_coef']:g}",
            number(point.get("objective")),
            interval(point.get("objective_ci95")),
            number(point.get("corrected_objective")),
            number(point.get("crossfit_objective")),
            number(point.get("reward")),
            number(point.get("kl"), 2),
            number(point.get("effective_samples"), 1),
        ]
        for point in points
    ]
    strong = next((i for i, point in enumerate(points) if point is best), None)
    faint = frozenset(
        i for i, p in enumerate(points) if best is None or p["kl_coef"] < best["kl_coef"]
    )
    return Grid("Optimum by kl_coef, before training", header, rows, strong, faint)


def best_of_n_grid(headroom: Mapping[str, Any]) -> Grid:
    """The best of 1, 2, 4, ... and all rewrites, for reference."""
    rows = [
        [
            str(best["n"]),
            number(best.get("reward")),
            number(best.get("crossfit_reward")),
            number(best.get("kl"), 2),
        ]
        for best in headroom.get("best_of_n") or []
        if _is_power_of_two(best["n"]) or best["n"] == headroom.get("num_rewrites")
    ]
    return Grid("Best of n rewrites", ["n", "reward", "cross-fitted", "KL at most"], rows)


def headroom_words(headroom: Mapping[str, Any]) -> list[str]:
    """What there is to gain, at which KL, and how far to trust it: one sentence each."""
    n, m = headroom.get("num_rewrites"), headroom.get("num_responses")
    untuned = headroom.get("untuned_reward")
    lines = []
    if is_number(untuned):
        bounds = headroom.get("untuned_ci95")
        lines.append(
            f"Untuned prompter: reward {number(untuned)}"
            f"{f' ({interval(bounds)})' if is_interval(bounds) else ''}"
            f"{_drawn(headroom)}."
        )
    split = headroom.get("variance") or {}
    between, within = split.get("between_rewrites"), split.get("within_rewrite")
    if is_number(between) and is_number(within):
        total = max(between, 0.0) + within
        lines.append(
            "Of a reward's variance given the prompt, "
            f"{share(max(between, 0.0) / total if total > 0 else 0.0)} lies between rewrites; the "
            "rest is the target's own noise."
        )
    point = recommended_point(headroom)
    if point is None:
        lines.append(
            f"No kl_coef of the grid leaves a third of {n or 'the'} rewrites effective: every "
            "estimate rests on one or two rewrites a prompt. Ask for more rewrites or larger "
            "kl_coefs."
        )
        return lines
    effective = point.get("effective_samples")
    of = f" ({number(effective, 1)} of {n} rewrites effective)" if is_number(effective) else ""
    lines.append(
        f"Smallest kl_coef that these samples support: {point['kl_coef']:g}{of}."
        f"{_forecast(point, untuned)}"
    )
    if is_number(point.get("reward")) and is_number(point.get("kl")):
        lines.append(
            f"The optimum there has reward {number(point['reward'])} at a KL of "
            f"{number(point['kl'], 2)} nats per rewrite."
        )
    lines += _noise(point, untuned, n, m)
    smaller = any(p["kl_coef"] < point["kl_coef"] for p in headroom["frontier"])
    if smaller and is_number(n) and n >= 1:
        lines.append(
            f"Dim rows rest on one or two rewrites a prompt: {n} rewrites show no KL above "
            f"log {n} = {log(n):.2f}, and training can go further than they say."
        )
    return lines


def _drawn(headroom: Mapping[str, Any]) -> str:
    names = {"num_prompts": "prompts", "num_rewrites": "rewrites", "num_responses": "responses"}
    if not all(is_number(headroom.get(key)) for key in names):
        return ""
    return ", " + " x ".join(f"{headroom[key]} {title}" for key, title in names.items())


def _forecast(point: Mapping[str, Any], untuned: Any) -> str:
    bounds = point.get("objective_ci95")
    if not (is_number(untuned) and is_interval(bounds)):
        return ""
    return (
        f" Forecast of the objective there: {number(untuned)} (untuned) to {number(bounds[1])} "
        "(the upper end)."
    )


def _noise(point: Mapping[str, Any], untuned: Any, n: Any, m: Any) -> list[str]:
    """What the target's noise does to the forecast."""
    crossfit, corrected = point.get("crossfit_objective"), point.get("corrected_objective")
    if m == 1:
        return ["With one response a rewrite, the target's noise makes the upper end too high."]
    if not (is_number(crossfit) and is_number(untuned) and is_number(m)):
        return []
    choosing = f"Choosing among {n} rewrites by {m - 1} response(s)"
    said = (
        f"{choosing} reaches {number(crossfit)} without training"
        if crossfit > untuned
        else f"{choosing} is not worth its KL ({number(crossfit)}): too few to tell rewrites apart"
    )
    if is_number(corrected):
        return [f"{said}; {number(corrected)} is the estimate corrected for noise."]
    return [f"{said}."]


def bound_grid(bound: Mapping[str, Any]) -> Grid:
    """Every term, the bound and the measured gaps."""
    terms = bound.get("terms") or {}
    named = [(_TERMS.get(key, key.replace("_", " ")), term) for key, term in terms.items()]
    named += [(title, bound.get(key) or {}) for key, title in _LINES.items()]
    rows = [
        [title, number(value.get("mean")), interval(value.get("ci95"))]
        for title, value in named
        if is_number(value.get("mean"))
    ]
    strong = next((i for i, row in enumerate(rows) if row[0] == "bound"), None)
    return Grid(
        "Bound on the gap to a tuned target", ["term", "mean", "95% interval"], rows, strong
    )


def rewards_grid(bound: Mapping[str, Any]) -> Grid:
    """The rewards that the bound was measured beside."""
    rows = [
        [arm_title(key), number(value.get("mean")), interval(value.get("ci95"))]
        for key, value in (bound.get("rewards") or {}).items()
    ]
    return Grid("Rewards", ["of", "mean", "95% interval"], rows)


def bound_words(bound: Mapping[str, Any]) -> list[str]:
    """Whether it holds, whether it says anything, and what it rests on: one sentence each."""
    return [said.text for said in bound_verdicts(bound)]


def bound_verdicts(bound: Mapping[str, Any]) -> list[Verdict]:
    """The same sentences with their tone."""
    mean, gap = ((bound.get(key) or {}).get("mean") for key in ("bound", "measured_gap"))
    holds = bound.get("holds")
    if not isinstance(holds, bool):
        said = [Verdict("unclear", "No gap was measured to hold against the bound.")]
    else:
        said = [
            Verdict(
                "better" if holds else "worse",
                f"The bound {'holds' if holds else 'DOES NOT HOLD'}: measured gap {number(gap)}, "
                f"bound {number(mean)}.",
            )
        ]
    said += [Verdict("unclear", text) for text in _about_bound(bound)]
    return said


def _about_bound(bound: Mapping[str, Any]) -> list[str]:
    lines = []
    limits = bound.get("reward_range")
    width = limits[1] - limits[0] if is_interval(limits) else limits
    span = f": rewards span {number(width)}" if is_number(width) else ""
    if bound.get("vacuous") is True:
        lines.append(f"It is vacuous{span}{', so' if span else ':'} no gap can exceed that anyway.")
    elif bound.get("vacuous") is False:
        lines.append(f"It is not vacuous{span}.")
    if bound.get("reward_range_source") == "observed" and is_interval(limits):
        lines.append(
            f"The range {interval(limits)} is what was observed, and so too narrow if anything; "
            "give reward_range to have the true one."
        )
    closed = bound.get("closed_form")
    if closed:
        lines.append(
            f"The tuned target is the closed-form optimum at kl_coef {closed['kl_coef']:g}, from "
            f"{number(closed['effective_samples'], 1)} effective responses a prompt: its reward "
            "and total variation are too low if anything."
        )
    if bound.get("num_responses") == 1:
        lines.append(
            "With one response a rewrite, the target's noise makes the KL and the reward of the "
            "prompted optimum too high, and so bound and gap too small."
        )
    cut = bound.get("truncated_responses")
    if is_number(cut) and cut > 0:
        lines.append(
            f"{share(cut)} of the responses were cut off at the last allowed token: the total "
            "variation is that of the process so truncated, as is the reward."
        )
    return lines


def bound_facts(bound: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the bound was computed for."""
    limits, facts = bound.get("reward_range"), []
    ends = interval(limits) if is_interval(limits) else number(limits)
    if ends:
        source = bound.get("reward_range_source")
        facts.append(("reward range", f"{ends}, {source}" if source else ends))
    if is_number(bound.get("kl_coef")):
        facts.append(("kl_coef", f"{bound['kl_coef']:g}"))
    if bound.get("tuned"):
        facts.append(("tuned target", str(bound["tuned"])))
    return facts


def _is_power_of_two(n: Any) -> bool:
    return isinstance(n, int) and n > 0 and n & (n - 1) == 0
