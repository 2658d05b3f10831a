"""Figures as SVG for the page, and what all plots share: colours, frame, legend.

A Figure of our own, never through pyplot: no display, no global state, any thread.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from alignpro.files import whole_file
from alignpro.optional import import_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name -> colour on white. In the page a name is the variable --plot-NAME, so that the plot follows
# light and dark; "text" is the colour of the text around. Each value is met once, here.
COLOURS = {
    "text": "#22262d",
    "trained": "#1f6fd0",
    "raw": "#7b818b",
    "untuned": "#a2811d",
    "static": "#b3462f",
    "policy_text": "#a8407c",
    "labelled": "#12808a",
    "optimum": "#7a4fc0",
    "soft": "#6b7f1a",
    "tuned": "#2a8a54",
    "frame": "#b9bfc9",
}
FONT_SIZE = 9.0  # points; a figure of 3.4 inches fills a phone at about 13 px


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed; it says how to get it.
    """
    figure: Figure = import_for("a plot", "matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def check_plot_file(path: Path) -> None:
    """Refuse what `save_figure` would, before there is a figure.

    Raises ValueError for a suffix that names no format of matplotlib's, and as `new_figure`.
    """
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if _format_of(path).lower() not in formats:
        raise ValueError(f"{path}: expected a suffix of {', '.join(sorted(formats))}")


def _format_of(path: Path) -> str:
    return path.suffix[1:] or "png"


def style(axes: Axes) -> None:
    axes.tick_params(colors=COLOURS["text"], labelsize=FONT_SIZE, color=COLOURS["frame"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(COLOURS["text"])
        label.set_fontsize(FONT_SIZE)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(COLOURS["frame"])


def legend_above(axes: Axes) -> None:
    """The legend over the axes, where it hides nothing, in as many columns as there is room for."""
    for columns in (3, 2, 1):
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=FONT_SIZE,
            labelcolor=COLOURS["text"],
            borderaxespad=0.2,
            handlelength=1.5,
            columnspacing=1.2,
        )
        # Before the layout axes take 77% of a figure's width, and about 85% after it.
        if legend.get_window_extent().width <= 1.1 * axes.get_window_extent().width:
            return


def save_figure(figure: Figure, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format=_format_of(path), dpi=150, facecolor="white")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element to put into a page.

    name: of this figure in its page; the ids inside start with it, so that figures do not take
    each other's. label: what a screen reader says. The same data give the same text.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A fixed salt and no date.
    with rc_context({"svg.hashsalt": "alignpro", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, value in COLOURS.items():
        svg = svg.replace(value, "currentColor" if colour == "text" else f"var(--plot-{colour})")
    # The page decides on the width; the view box keeps the proportions. The metadata block names
    # addresses, and the page should name none.
    opening = svg[: svg.index(">")]
    bare = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    described = f'{bare} role="img" aria-label="{html.escape(label)}"'
    svg = described + svg[len(opening) :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
