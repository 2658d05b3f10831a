"""What the plots share: the style of axes, and a figure as text that goes into a page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stands for "the colour of the text around": replaced in the SVG so that it follows light and dark.
TEXT_COLOUR = "#010203"


def svg_text(figure: Figure) -> str:
    """A figure as an ``<svg>`` element; what is drawn in TEXT_COLOUR has the page's text colour."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A fixed salt and no date: the same data give the same file.
    with rc_context({"svg.hashsalt": "alignpro", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT_COLOUR, "currentColor")
    # The page decides on the width; the view box keeps the proportions. The metadata block names
    # addresses, and the page should name none.
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def style_axes(axes: Axes, colour: str) -> None:
    axes.tick_params(colors=colour)
    axes.xaxis.label.set_color(colour)
    axes.yaxis.label.set_color(colour)
    axes.spines["top"].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(colour)
