"""The plot of a run: training reward and KL by step, and the held-out arms with their intervals.

Drawn on a Figure of our own, never through pyplot: no display, no global state, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro.report.figures import TEXT_COLOUR as _TEXT_COLOUR
from alignpro.report.figures import style_axes as _style
from alignpro.report.figures import svg_text
from alignpro.report.words import arms_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REWARD_COLOUR = "#2a7de1"
_KL_COLOUR = "#d9822b"
_ARM_COLOURS = {"raw": "#8a8f98", "untuned": "#b59a3b", "trained": "#2a7de1"}


def reward_curve(
    metrics: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the plot to ``path`` (PNG by its suffix, or anything matplotlib knows) and returns it.

    metrics: rows of metrics.jsonl; those without "step" and "reward_mean" (a supervised stage) are
    passed over. report: adds the held-out arms beside the curve.
    """
    path = Path(path)
    figure = _draw(metrics, report, colour="#222222")
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def reward_svg(
    metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any] | None = None
) -> str:
    """The same plot as an ``<svg>`` element to put into a page; its text has the page's colour.

    The panels stand one above the other, so that a phone shows them at a readable size.
    """
    return svg_text(_draw(metrics, report, colour=_TEXT_COLOUR, stacked=True))


def _draw(
    metrics: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any] | None,
    colour: str,
    stacked: bool = False,
) -> Figure:
    from matplotlib.figure import Figure

    rows = [row for row in metrics if _has_numbers(row, ("step", "reward_mean"))]
    has_arms = report is not None and bool(report.get("arms"))
    panels = int(bool(rows)) + int(has_arms)
    down, across = (max(panels, 1), 1) if stacked else (1, max(panels, 1))
    figure = Figure(figsize=(4.6 * across, 3.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    if rows:
        _draw_training(axes[0], rows, colour)
    if has_arms and report is not None:
        _draw_arms(axes[-1], report, colour)
    if not panels:
        axes[0].text(0.5, 0.5, "nothing to plot yet", ha="center", va="center", color=colour)
    return figure


def _draw_training(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    steps = [float(row["step"]) for row in rows]
    reward = [float(row["reward_mean"]) for row in rows]
    axes.plot(steps, reward, color=_REWARD_COLOUR, marker="o", markersize=3)
    axes.set_title("training", color=colour)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    _style(axes, colour)
    axes.yaxis.label.set_color(_REWARD_COLOUR)
    with_kl = [row for row in rows if _has_numbers(row, ("kl_per_rewrite",))]
    if with_kl:
        right = axes.twinx()
        right.plot(
            [float(row["step"]) for row in with_kl],
            [float(row["kl_per_rewrite"]) for row in with_kl],
            color=_KL_COLOUR,
            linestyle="--",
        )
        right.set_ylabel("KL per rewrite (nats)")
        right.set_ylim(bottom=0)
        _style(right, colour)
        right.yaxis.label.set_color(_KL_COLOUR)


def _draw_arms(axes: Axes, report: Mapping[str, Any], colour: str) -> None:
    for position, (key, _, arm) in enumerate(arms_of(report)):
        mean = float(arm["mean_reward"])
        low, high = (float(bound) for bound in arm["ci95"])
        axes.errorbar(
            [position],
            [mean],
            yerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
            fmt="o",
            capsize=5,
            color=_ARM_COLOURS.get(key, _KL_COLOUR),
        )
    titles = [title.replace(" ", "\n", 1) for _, title, _ in arms_of(report)]
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.5, len(titles) - 0.5)
    axes.set_title("held-out prompts, 95% intervals", color=colour)
    axes.set_ylabel("mean reward")
    _style(axes, colour)


def _has_numbers(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(isinstance(row.get(name), (int, float)) for name in names)
