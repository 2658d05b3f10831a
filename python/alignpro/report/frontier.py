"""The headroom frontier as a plot: the reward that a KL buys, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro.report.svg import COLOURS, FONT_SIZE, legend_above, new_figure, style, to_svg
from alignpro.report.words import is_interval, is_number, recommended_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Weights from half of the responses buy another KL than those from all.
_CROSSFIT = ("crossfit_kl", "crossfit_reward")
_APART = 26.0  # points of paper between labelled points of the curve


def frontier_svg(headroom: Mapping[str, Any], trained: Mapping[str, Any] | None = None) -> str:
    """Reward against KL over kl_coef as an ``<svg>`` element.

    headroom: as headroom.json: ``frontier`` [{kl_coef, reward, kl, crossfit_reward, ...}],
    ``best_of_n`` [{n, reward, kl}], ``untuned_reward``, ``recommended_kl_coef``; points without
    numbers are passed over. trained: what training reached: ``reward``, ``kl`` (nats per rewrite),
    ``ci95`` of the reward.
    """
    return to_svg(_draw(headroom, trained), "frontier", "reward against KL to the untuned prompter")


def frontier_png(
    headroom: Mapping[str, Any], path: str | Path, trained: Mapping[str, Any] | None = None
) -> Path:
    """The same as a file: PNG by its suffix, or anything matplotlib knows. Returns the path."""
    path = Path(path)
    _draw(headroom, trained).savefig(path, dpi=150, facecolor="white")
    return path


def _draw(headroom: Mapping[str, Any], trained: Mapping[str, Any] | None) -> Figure:
    figure = new_figure(3.8, 3.5)
    axes = figure.subplots()
    frontier = sorted(_with(headroom.get("frontier"), "kl_coef"), key=lambda p: float(p["kl"]))
    if frontier:
        _line(axes, frontier, ("kl", "reward"), "trained", "-", "o", "optimum by kl_coef")
        crossfit = [p for p in frontier if all(is_number(p.get(k)) for k in _CROSSFIT)]
        if crossfit:
            _line(axes, crossfit, _CROSSFIT, "optimum", "--", "", "cross-fit")
    best_of_n = sorted(_with(headroom.get("best_of_n"), "n"), key=lambda p: float(p["kl"]))
    if best_of_n:
        _line(axes, best_of_n, ("kl", "reward"), "raw", "-", "s", "best of n")
    if is_number(headroom.get("untuned_reward")):
        axes.plot(
            [0.0],
            [headroom["untuned_reward"]],
            "D",
            color=COLOURS["untuned"],
            label="untuned",
            zorder=3,
        )
    if trained is not None and is_number(trained.get("kl")) and is_number(trained.get("reward")):
        _draw_trained(axes, trained)
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
    _label(axes, first + frontier, "kl_coef", "{:.2g}", "trained", (-3, 4), "right")
    _label(axes, best_of_n, "n", "n={:g}", "raw", (3, -10), "left")
    return figure


def _draw_trained(axes: Axes, trained: Mapping[str, Any]) -> None:
    reward, ci95 = float(trained["reward"]), trained.get("ci95")
    low, high = ci95 if is_interval(ci95) else (reward, reward)
    axes.errorbar(
        [trained["kl"]],
        [reward],
        yerr=[[max(reward - low, 0.0)], [max(high - reward, 0.0)]],
        fmt="*",
        markersize=10,
        capsize=3,
        color=COLOURS["tuned"],
        label="trained",
        zorder=4,
    )


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    names: tuple[str, str],
    colour: str,
    dashes: str,
    marker: str,
    label: str,
) -> None:
    axes.plot(
        [row[names[0]] for row in rows],
        [row[names[1]] for row in rows],
        color=COLOURS[colour],
        linestyle=dashes,
        linewidth=1.4,
        marker=marker,
        markersize=3.5,
        label=label,
    )


def _label(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
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
        x, y = axes.transData.transform((row["kl"], row["reward"])) * scale
        if any(((x - a) ** 2 + (y - b) ** 2) ** 0.5 < _APART for a, b in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            form.format(row[name]),
            (row["kl"], row["reward"]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize=FONT_SIZE - 1,
            color=COLOURS[colour],
        )


def _with(rows: Any, name: str) -> list[Mapping[str, Any]]:
    """The rows that have numbers for KL, reward and ``name``."""
    return [r for r in rows or [] if all(is_number(r.get(k)) for k in ("kl", "reward", name))]
