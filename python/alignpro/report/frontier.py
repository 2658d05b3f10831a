"""The headroom frontier as a plot: the reward that a KL buys, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignpro.evaluate.results import Evaluation, Headroom, Interval
from alignpro.report.svg import (
    COLOURS,
    FONT_SIZE,
    legend_above,
    new_figure,
    save_figure,
    style,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_APART = 26.0  # points of paper between labelled points of the curve
Point = tuple[float, float, str]  # KL, reward, name


def frontier_svg(headroom: Headroom, trained: Evaluation | None = None) -> str:
    """Reward against KL over kl_coef as an ``<svg>`` element.

    trained: its trained arm stands at its KL and, since the forecast may have been made on other
    prompts, at its paired gain over the untuned arm.
    """
    return to_svg(_draw(headroom, trained), "frontier", "reward against KL to the untuned prompter")


def frontier_png(headroom: Headroom, path: str | Path, trained: Evaluation | None = None) -> Path:
    """The same as a file: PNG by its suffix, or anything matplotlib knows. Returns the path."""
    path = Path(path)
    save_figure(_draw(headroom, trained), path)
    return path


def _draw(headroom: Headroom, trained: Evaluation | None) -> Figure:
    figure = new_figure(3.8, 3.5)
    axes = figure.subplots()
    untuned, frontier = headroom.untuned, headroom.frontier
    start = [(0.0, untuned.mean)]  # every curve begins at rho_sft
    optimum = [(p.kl, p.reward, f"{p.kl_coef:.2g}") for p in frontier]
    _line(axes, start, optimum, "trained", "-o", "optimum by kl_coef")
    crossfit = [
        (p.crossfit_kl, p.crossfit_reward, "")
        for p in frontier
        if p.crossfit_kl is not None and p.crossfit_reward is not None
    ]
    _line(axes, start, crossfit, "optimum", "--", "cross-fit")
    # Judged by the responses that it was chosen by, the best of n is praised for its luck.
    best_of_n = [
        (b.kl, b.reward if b.crossfit_reward is None else b.crossfit_reward, f"n={b.n}")
        for b in headroom.best_of_n
    ]
    _line(axes, [], best_of_n, "raw", "-s", "best of n")
    _whisker(axes, 0.0, untuned, "D", "untuned")
    gain = None if trained is None else trained.paired.get("trained_minus_untuned")
    if trained is not None and gain is not None and trained.kl_per_rewrite is not None:
        moved = Interval(*(untuned.mean + value for value in gain))
        _whisker(axes, trained.kl_per_rewrite, moved, "*", "trained")
    best = headroom.recommended
    if best is not None:
        axes.plot(
            [best.kl],
            [best.reward],
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
    if best is not None:
        optimum.insert(0, optimum[frontier.index(best)])
    _label(axes, optimum, "trained", (-3, 4), "right")
    _label(axes, best_of_n, "raw", (3, -10), "left")
    return figure


def _whisker(axes: Axes, kl: float, reward: Interval, marker: str, arm: str) -> None:
    mean, low, high = reward
    axes.errorbar(
        [kl],
        [mean],
        yerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
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
    points: Sequence[Point],
    colour: str,
    form: str,
    label: str,
) -> None:
    xy = start + sorted((kl, reward) for kl, reward, _ in points)
    if points:
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
    axes: Axes, points: Sequence[Point], colour: str, offset: tuple[float, float], side: str
) -> None:
    """Names points of a curve, the first before all, as far as they stand apart on paper."""
    taken: list[tuple[float, float]] = []
    scale = 72.0 / axes.figure.dpi
    for kl, reward, name in points:
        x, y = axes.transData.transform((kl, reward)) * scale
        if any(((x - a) ** 2 + (y - b) ** 2) ** 0.5 < _APART for a, b in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            name,
            (kl, reward),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize=FONT_SIZE - 1,
            color=COLOURS[colour],
        )
