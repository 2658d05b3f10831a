"""The plots of a run: training step by step, and the held-out arms with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignpro.evaluate.results import Evaluation, Interval
from alignpro.report.svg import (
    COLOURS,
    FONT_SIZE,
    legend_above,
    new_figure,
    save_figure,
    style,
    to_svg,
)
from alignpro.report.words import arm_title, in_order, is_number, paired_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 3.4, 2.3  # inches, of a small multiple
_WIDE = 3.8  # inches, of a plot with an arm a line
_MARKED = 60  # points; beyond them a line is drawn without markers


class Series(NamedTuple):
    key: str  # of the metrics
    label: str
    colour: str
    dashed: bool = False


class Panel(NamedTuple):
    """One small multiple; a series without numbers is left out, a panel without series too."""

    title: str
    unit: str
    series: tuple[Series, ...]
    only_if_varying: bool = False  # a constant line tells nothing


PANELS = (
    Panel(
        "Reward",
        "mean reward",
        (
            Series("reward_mean", "training", "trained"),
            Series("heldout.reward_mean", "held out", "tuned"),
        ),
    ),
    Panel(
        "KL to the reference",
        "nats per rewrite",
        (
            Series("kl_per_rewrite", "exact", "trained"),
            Series("k1_per_rewrite", "k1", "untuned", dashed=True),
            Series("k3_per_rewrite", "k3", "static", dashed=True),
        ),
    ),
    Panel("Entropy", "nats per token", (Series("entropy", "policy", "trained"),)),
    Panel(
        "Lengths",
        "tokens",
        (
            Series("rewrite_tokens", "rewrites", "trained"),
            Series("response_tokens", "responses", "tuned"),
        ),
    ),
    Panel("Gradient norm", "before clipping", (Series("grad_norm", "norm", "trained"),)),
    Panel("kl_coef", "lambda", (Series("kl_coef", "kl_coef", "trained"),), only_if_varying=True),
    Panel(
        "Variance of the reward",
        "reward squared",
        (
            Series("variance_between", "between rewrites", "trained"),
            Series("variance_within", "within a rewrite", "tuned"),
        ),
    ),
    Panel(
        "Groups without signal",
        "groups a step",
        (Series("zero_advantage_groups", "groups", "trained"),),
        only_if_varying=True,
    ),
    Panel(
        "Rewrites that are one text",
        "share of a step's",
        (Series("common_rewrite", "most frequent", "trained"),),
        only_if_varying=True,
    ),
)


def reward_curve(
    metrics: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    evaluation: Evaluation | None = None,
) -> Path:
    """Writes reward, KL and held-out arms side by side to ``path`` (PNG by its suffix, or anything
    matplotlib knows) and returns it.

    metrics: rows of metrics.jsonl; those without "step" and "reward_mean" (a supervised stage) are
    passed over. evaluation: adds the held-out arms beside the curve.
    """
    panels = panels_of(metrics)[:2]
    across = len(panels) + (evaluation is not None)
    arms = 0 if evaluation is None else len(evaluation.arms)
    figure = new_figure(4.2 * max(across, 1), max(3.2, 0.9 + 0.36 * arms))
    all_axes = figure.subplots(1, max(across, 1), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=False):
        draw_panel(axes, panel, metrics, evaluation)
        axes.set_ylabel(f"{panel.title}, {panel.unit}")
    if evaluation is not None:
        draw_arms(all_axes[-1], evaluation)
        all_axes[-1].set_xlabel("mean reward on held-out prompts, 95% intervals")
    if not across:
        all_axes[0].text(0.5, 0.5, "nothing to plot yet", ha="center", va="center")
        all_axes[0].set_axis_off()
    path = Path(path)
    save_figure(figure, path)
    return path


def curve_svgs(
    metrics: Sequence[Mapping[str, Any]], evaluation: Evaluation | None
) -> list[tuple[str, str]]:
    """(title, ``<svg>``) of every panel that the metrics have numbers for."""
    drawn = []
    for index, panel in enumerate(panels_of(metrics)):
        figure = new_figure(_WIDTH, _HEIGHT)
        draw_panel(figure.subplots(), panel, metrics, evaluation)
        drawn.append((panel.title, to_svg(figure, f"curve{index}", f"{panel.title} by step")))
    return drawn


def arms_svg(evaluation: Evaluation) -> str:
    figure = new_figure(_WIDE, 0.7 + 0.36 * len(evaluation.arms))
    draw_arms(figure.subplots(), evaluation)
    return to_svg(figure, "arms", "mean reward of every arm with its 95% interval")


def paired_svg(evaluation: Evaluation) -> str:
    paired = paired_of(evaluation)
    figure = new_figure(_WIDE, 0.7 + 0.36 * len(paired))
    axes = figure.subplots()
    rows = [(f"minus {arm_title(key)}", d, key) for key, d in paired.items()]
    _whiskers(axes, rows, "reward per prompt", sign=True)
    axes.axvline(0.0, color=COLOURS["frame"], zorder=0)
    return to_svg(figure, "paired", "paired differences of reward with their 95% intervals")


def panels_of(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels that have something to show, each with its series that have."""
    found = []
    for panel in PANELS:
        series = []
        for one in panel.series:
            values = [y for _, y in points(metrics, one.key)]
            if values and not (panel.only_if_varying and len(set(values)) == 1):
                series.append(one)
        if series:
            found.append(panel._replace(series=tuple(series)))
    return found


def points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the reinforcement-learning rows that have a number there."""
    *groups, name = key.split(".")
    found = []
    for row in metrics:
        inner: Any = row
        for group in groups:
            inner = inner.get(group) or {}
        if all(map(is_number, (row.get("step"), row.get("reward_mean"), inner.get(name)))):
            found.append((float(row["step"]), float(inner[name])))
    return found


def draw_panel(
    axes: Axes,
    panel: Panel,
    metrics: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
) -> None:
    """One small multiple; the reward's has the held-out arms as lines across."""
    from matplotlib.ticker import MaxNLocator

    for series in panel.series:
        xy = points(metrics, series.key)
        axes.plot(
            [x for x, _ in xy],
            [y for _, y in xy],
            color=COLOURS[series.colour],
            linestyle="--" if series.dashed else "-",
            linewidth=1.4,
            marker="o" if len(xy) <= _MARKED else "",
            markersize=2.5,
            label=series.label,
        )
    lines = len(panel.series)
    if panel.series[0].key == "reward_mean":
        for key, label in (("raw", "raw held out"), ("trained", "trained held out")):
            if evaluation is not None and key in evaluation.arms:
                axes.axhline(
                    evaluation.arms[key].reward.mean,
                    color=COLOURS[key],
                    linestyle=":",
                    linewidth=1.2,
                    label=label,
                )
                lines += 1
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if lines > 1:
        legend_above(axes)
    style(axes)


def draw_arms(axes: Axes, evaluation: Evaluation) -> None:
    rows = [(arm_title(key), arm.reward, key) for key, arm in in_order(evaluation.arms).items()]
    _whiskers(axes, rows, "mean reward")


def _whiskers(
    axes: Axes, rows: Sequence[tuple[str, Interval, str]], unit: str, *, sign: bool = False
) -> None:
    """rows: (label, interval, arm)."""
    from matplotlib.ticker import MaxNLocator

    for position, (_, (mean, low, high), arm) in enumerate(rows):
        axes.errorbar(
            [mean],
            [position],
            xerr=[[max(mean - low, 0.0)], [max(high - mean, 0.0)]],
            fmt="o",
            markersize=5,
            capsize=3,
            color=COLOURS.get(arm, COLOURS["raw"]),
        )
        axes.annotate(
            f"{mean:+.3f}" if sign else f"{mean:.3f}",
            (mean, position),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=FONT_SIZE - 1,
            color=COLOURS["text"],
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_yticks(range(len(rows)), [_plain(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel(unit)
    style(axes)
    axes.tick_params(axis="y", length=0)


def _plain(label: str) -> str:
    """A label cut to a line, with nothing in it that matplotlib would read as mathematics."""
    cut = label if len(label) <= 28 else label[:27] + "\N{HORIZONTAL ELLIPSIS}"
    return cut.replace("$", r"\$")
