"""The reward-against-KL frontier of a headroom, and where a trained prompter stands beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro.report.figures import TEXT_COLOUR, style_axes, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLAIN, _CROSSFIT, _BEST, _TRAINED = "#2a7de1", "#2e9e6b", "#8a8f98", "#d9822b"


def frontier_plot(
    headroom: Mapping[str, Any], path: str | Path, *, report: Mapping[str, Any] | None = None
) -> Path:
    """Writes the plot to ``path`` (PNG by its suffix, or anything matplotlib knows) and returns it.

    headroom: the part of that name of report.json. report: an evaluation; adds its trained arm at
    its KL, as the paired gain over the untuned arm, which stands for the untuned reward here.
    """
    path = Path(path)
    _draw(headroom, report, "#222222").savefig(path, dpi=150, facecolor="white")
    return path


def frontier_svg(headroom: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> str:
    """The same plot as an ``<svg>`` element to put into a page; its text has the page's colour."""
    return svg_text(_draw(headroom, report, TEXT_COLOUR))


def _draw(headroom: Mapping[str, Any], report: Mapping[str, Any] | None, colour: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    untuned = float(headroom["untuned_reward"])
    # Every curve starts at rho_sft: KL 0, the untuned reward.
    points = sorted(headroom["frontier"], key=lambda point: -point["kl_coef"])
    _curve(axes, points, untuned, ("kl", "reward"), "optimum, plain", _PLAIN)
    _curve(
        axes,
        points,
        untuned,
        ("crossfit_kl", "crossfit_reward"),
        "optimum, cross-fitted",
        _CROSSFIT,
    )
    judged = "reward" if headroom["num_responses"] < 2 else "crossfit_reward"
    axes.plot(
        [best["kl"] for best in headroom["best_of_n"]],
        [best[judged] for best in headroom["best_of_n"]],
        color=_BEST,
        linestyle="--",
        label="best of n",
    )
    low, high = (float(bound) for bound in headroom["untuned_ci95"])
    axes.errorbar(
        [0],
        [untuned],
        yerr=[[max(untuned - low, 0.0)], [max(high - untuned, 0.0)]],
        fmt="o",
        capsize=4,
        color=colour,
        label="untuned",
    )
    _mark_recommended(axes, headroom, points, colour)
    _mark_trained(axes, report, untuned)
    axes.set_xlabel("KL to the untuned prompter (nats per rewrite)")
    axes.set_ylabel("mean reward")
    axes.set_xlim(left=-0.05)
    style_axes(axes, colour)
    legend = axes.legend(frameon=False, fontsize="small", loc="lower right")
    for text in legend.get_texts():
        text.set_color(colour)
    return figure


def _curve(
    axes: Axes,
    points: list[Mapping[str, Any]],
    untuned: float,
    keys: tuple[str, str],
    label: str,
    colour: str,
) -> None:
    x, y = keys
    known = [point for point in points if point.get(y) is not None]
    if known:
        axes.plot(
            [0.0, *(point[x] for point in known)],
            [untuned, *(point[y] for point in known)],
            color=colour,
            marker="o",
            markersize=3,
            label=label,
        )


def _mark_recommended(
    axes: Axes, headroom: Mapping[str, Any], points: list[Mapping[str, Any]], colour: str
) -> None:
    for point in points:
        if point["kl_coef"] == headroom["recommended_kl_coef"]:
            axes.annotate(
                f"kl_coef {point['kl_coef']:g}",
                (point["kl"], point["reward"]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color=colour,
            )


def _mark_trained(axes: Axes, report: Mapping[str, Any] | None, untuned: float) -> None:
    difference = ((report or {}).get("paired") or {}).get("trained_minus_untuned")
    kl = (report or {}).get("kl_per_rewrite")
    if difference is None or kl is None:
        return
    mean = float(difference["mean"])
    low, high = (float(bound) for bound in difference["ci95"])
    axes.errorbar(
        [kl],
        [untuned + mean],
        yerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
        fmt="s",
        capsize=4,
        color=_TRAINED,
        label="trained, held out",
    )
