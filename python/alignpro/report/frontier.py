"""The headroom frontier as a plot: the reward that a KL buys, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro.report.svg import (
    COLOURS,
    FONT_SIZE,
    legend_above,
    new_figure,
    save_figure,
    style,
    to_svg,
)
from alignpro.report.words import is_interval, is_number, recommended_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_APART = 26.0  # points of paper between labelled points of the curve


def frontier_svg(headroom: Mapping[str, Any], trained: Mapping[str, Any] | None = None) -> str:
    """Reward against KL over kl_coef as an ``<svg>`` element.

    headroom: as headroom.json: ``frontier`` [{kl_coef, reward, kl, crossfit_reward, ...}],
    ``best_of_n`` [{n, reward, kl}], ``untuned_reward``, ``recommended_kl_coef``; points without
    numbers are passed over. trained: an evaluation; its trained arm stands at its KL and, since
    the forecast may have been made on other prompts, at its paired gain over the untuned arm.
    """
    return to_svg(_draw(headroom, trained), "frontier", "reward against KL to the untuned prompter")


def frontier_png(
    headroom: Mapping[str, Any], path: str | Path, trained: Mapping[str, Any] | None = None
) -> Path:
    """The same as a file: PNG by its suffix, or anything matplotlib knows. Returns the path."""
    path = Path(path)
    save_figure(_draw(headroom, trained), path)
    return path


def _draw(headroom: Mapping[str, Any], trained: Mapping[str, Any] | None) -> Figure:
    figure = new_figure(3.8, 3.5)
    axes = figure.subplots()
    untuned, several = headroom.get("untuned_reward"), headroom.get("num_responses") != 1
    start = [(0.0, float(untuned))] if is_number(untuned) else []  # every curve begins at rho_sft
    frontier = _with(headroom.get("frontier"), "kl_coef", "kl", "reward")
    _line(axes, start, frontier, ("kl", "reward"), "trained", "-o", "optimum by kl_coef")
    for x in ("crossfit_kl", "kl"):
        crossfit = _with(frontier, x, "crossfit_reward")
        if crossfit:
            _line(axes, start, crossfit, (x, "crossfit_reward"), "optimum", "--", "cross-fit")
            break
    # Judged by the responses that it was chosen by, the best of n is praised for its luck.
    judged = "crossfit_reward" if several else "reward"
    best_of_n = _with(headroom.get("best_of_n"), "n", "kl", judged)
    if not best_of_n:
        judged, best_of_n = "reward", _with(headroom.get("best_of_n"), "n", "kl", "reward")
    _line(axes, [], best_of_n, ("kl", judged), "raw", "-s", "best of n")
    if start:
        _whisker(axes, 0.0, start[0][1], headroom.get("untuned_ci95"), "D", "untuned")
    if trained is not None and start:
        _draw_trained(axes, trained, start[0][1])
    best = recommended_point(headroom)
    if best is not None and any(p is best for p in frontier):
        axes.plot(
            [best["kl"]],
            [best["reward"]],
            "o",
            markersize=11,
            markerfacecolor="none",
            color=COLOURS["trained"],
            label="recommended",
        )
    axes.set_xlabel("KL to untuned (nats per rewrite)")
    axes.set_ylabel("mean reward")
    axes.margins(x=0.08, y=0.12)
    if axes.has_data():
        legend_above(axes)
    style(axes)
    figure.draw_without_rendering()  # the layout decides how far points are apart on paper
    first = [p for p in frontier if p is best]
    _label(axes, first + frontier, "reward", "kl_coef", "{:.2g}", "trained", (-3, 4), "right")
    _label(axes, best_of_n, judged, "n", "n={:g}", "raw", (3, -10), "left")
    return figure


def _draw_trained(axes: Axes, trained: Mapping[str, Any], untuned: float) -> None:
    gain = (trained.get("paired") or {}).get("trained_minus_untuned")
    kl = trained.get("kl_per_rewrite")
    if gain is not None and is_number(kl) and is_number(gain.get("mean")):
        ci95 = gain.get("ci95")
        moved = [untuned + bound for bound in ci95] if is_interval(ci95) else None
        _whisker(axes, kl, untuned + gain["mean"], moved, "*", "trained")


def _whisker(axes: Axes, kl: float, reward: float, ci95: Any, marker: str, arm: str) -> None:
    low, high = ci95 if is_interval(ci95) else (reward, reward)
    axes.errorbar(
        [kl],
        [reward],
        yerr=[[max(reward - low, 0.0)], [max(high - reward, 0.0)]],
        fmt=marker,
        markersize=10 if marker == "*" else 5,
        capsize=3,
        color=COLOURS["tuned" if arm == "trained" else arm],
        label=arm,
        zorder=4,
    )


def _line(
    axes: Axes,
    start: list[tuple[float, float]],
    rows: Sequence[Mapping[str, Any]],
    keys: tuple[str, str],
    colour: str,
    form: str,
    label: str,
) -> None:
    x, y = keys
    xy = start + sorted((float(row[x]), float(row[y])) for row in rows)
    if rows:
        axes.plot(
            [x for x, _ in xy],
            [y for _, y in xy],
            form,
            color=COLOURS[colour],
            linewidth=1.4,
            markersize=3.5,
            label=label,
        )


def _label(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    y_key: str,
    name: str,
    form: str,
    colour: str,
    offset: tuple[float, float],
    side: str,
) -> None:
    """Names points of a curve, the first before all, as far as they stand apart on paper."""
    taken: list[tuple[float, float]] = []
    scale = 72.0 / axes.figure.dpi
    for row in rows:
        x, y = axes.transData.transform((row["kl"], row[y_key])) * scale
        if any(((x - a) ** 2 + (y - b) ** 2) ** 0.5 < _APART for a, b in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            form.format(row[name]),
            (row["kl"], row[y_key]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize=FONT_SIZE - 1,
            color=COLOURS[colour],
        )


def _with(rows: Any, *names: str) -> list[Mapping[str, Any]]:
    """The rows that have numbers under every name."""
    return [row for row in rows or [] if all(is_number(row.get(name)) for name in names)]
