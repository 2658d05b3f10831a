"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alignpro.report.grids import (
    Grid,
    arms_grid,
    costs,
    sample_arms,
)
from alignpro.report.warnings import find_warnings
from alignpro.report.words import (
    Verdict,
    gap_closed_sentence,
    headline,
    judge_verdict,
    printable,
    verdicts,
)

# Model text is always given as Text: a plain str would be read as rich's own markup.
_WIDE, _TIGHT = 7, box.SIMPLE_HEAD  # columns; eight fit into 80 characters without a frame
TONES = {"better": "green", "worse": "red", "unclear": ""}


def grid_table(grid: Grid) -> Table:
    """A grid as a table of the terminal."""
    table = Table(title=Text(printable(grid.title)), title_justify="left")
    if len(grid.header) > _WIDE:
        table.box, table.show_edge, table.pad_edge, table.padding = (
            _TIGHT,
            False,
            False,
            (0, 0, 0, 1),
        )
    for index, title in enumerate(grid.header):
        table.add_column(Text(printable(title)), justify="right" if index else "left")
    for index, row in enumerate(grid.rows):
        cells = (Text(printable(cell)) for cell in row)
        table.add_row(*cells, style=_style(grid, index))
    return table


def _style(grid: Grid, row: int) -> str | None:
    return "bold" if row == grid.strong else "dim" if row in grid.faint else None


def arms_table(report: Mapping[str, Any]) -> Table:
    """Arms by row: mean reward with its 95% interval, variance, components, prompts."""
    return grid_table(arms_grid(report))


def verdict_lines(report: Mapping[str, Any]) -> Text:
    """The answer, then the paired differences and the judge's win rates, one line each."""
    lines = [headline(report), *(sentence for _, sentence in verdicts(report))]
    judge = report.get("judge") or {}
    lines += [judge_verdict(name, row) for name, row in (judge.get("comparisons") or {}).items()]
    text = Text("\n").join(toned(line) for line in lines)
    if report.get("gap_closed"):
        text.append("\n" + printable(gap_closed_sentence(report["gap_closed"])))
    return text


def toned(said: Verdict) -> Text:
    """A verdict in its colour."""
    return Text(printable(said.text), style=TONES[said.tone])


def warning_lines(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> Text:
    """What to doubt, one line each; empty where there is nothing."""
    lines = [f"warning: {printable(finding.text)}" for finding in find_warnings(report, metrics)]
    return Text("\n".join(lines), style="yellow")


def costs_table(report: Mapping[str, Any]) -> Table:
    """KL per rewrite, speed, memory, seconds by stage: as far as the report has them."""
    table = Table(show_header=False, box=None)
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in costs(report):
        table.add_row(Text(printable(what)), Text(value))
    return table


def samples_panel(samples: Sequence[Mapping[str, Any]]) -> Group:
    """One panel a sample: what was asked, and arm by arm what was added and what was answered."""
    return Group(*(_sample_panel(sample) for sample in samples))


def _sample_panel(sample: Mapping[str, Any]) -> Panel:
    text = Text()
    for arm in sample_arms(sample):
        reward = f" (reward {arm.reward})" if arm.reward else ""
        for label, written in (("rewrite", arm.rewrite), (f"response{reward}", arm.response)):
            if written is not None:
                text.append(printable(f"{arm.key} {label}: "), style="bold")
                text.append(printable(written).strip() + "\n")
    text.rstrip()
    title = Text(" ".join(printable(sample["prompt"]).split()))
    return Panel(text, title=title, title_align="left")
