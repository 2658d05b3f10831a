"""How sharp a prompt should be, as a table and as a plot (`theory.prompt_attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignpro.report.grids import Grid
from alignpro.report.svg import COLOURS, legend_above, new_figure, save_figure, style
from alignpro.theory.prompt_attention import AttentionData, SharpnessPoint


def sharpness_grid(points: Sequence[SharpnessPoint]) -> Grid:
    header = ["kappa", "error", "predicted", "on relevant tokens", "predicted"]
    rows = [
        [
            f"{point.kappa:.3g}",
            f"{point.measured.error:.3f}",
            f"{point.predicted.error:.3f}",
            f"{point.measured.mass:.3f}",
            f"{point.predicted.mass:.3f}",
        ]
        for point in points
    ]
    best = min(range(len(points)), key=lambda i: points[i].measured.error)
    return Grid("A prompt of length kappa", header, rows, best)


def sharpness_figure(data: AttentionData, points: Sequence[SharpnessPoint], path: Path) -> None:
    """To a file, of the kind that its suffix says."""
    figure = new_figure(6.8, 3.2)
    kappas = [point.kappa for point in points]
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("error", "mass"),
        ("error", "attention on relevant tokens"),
        strict=True,
    ):
        predicted = [getattr(point.predicted, name) for point in points]
        measured = [getattr(point.measured, name) for point in points]
        axes.plot(kappas, predicted, color=COLOURS["optimum"], label="predicted, many tokens")
        axes.plot(kappas, measured, "o", color=COLOURS["trained"], markersize=4, label="measured")
        axes.axvline(data.best_kappa, color=COLOURS["frame"], linestyle="--", linewidth=1)
        axes.set_xlabel("kappa")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        legend_above(axes)
        style(axes)
    save_figure(figure, path)
