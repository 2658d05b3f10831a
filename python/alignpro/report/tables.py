"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alignpro.evaluate.results import (
    BoundReport,
    Evaluation,
    GoalsForecast,
    Headroom,
    MixReport,
    Report,
    SafetyResult,
    Sample,
)
from alignpro.report.grids import (
    Grid,
    arms_grid,
    costs,
    jailbreak_words,
    judge_grid,
    paired_safety_grid,
    safety_grid,
    texts_grid,
)
from alignpro.report.theory import (
    best_of_n_grid,
    bound_grid,
    bound_verdicts,
    frontier_grid,
    goals_grid,
    goals_words,
    headroom_words,
    mix_grid,
    mix_words,
    rewards_grid,
)
from alignpro.report.warnings import find_warnings
from alignpro.report.words import (
    Verdict,
    gap_sentences,
    headline,
    in_order,
    judge_verdicts,
    number,
    printable,
    required_verdicts,
    search_sentence,
    verdicts,
)

# Model text is always given as Text: a plain str would be read as rich's own markup.
_WIDE, _TIGHT = 6, box.SIMPLE_HEAD  # columns; eight fit into 80 characters without a frame
TONES = {"better": "green", "worse": "red", "unclear": ""}


def grid_table(grid: Grid) -> Table:
    table = Table(title=Text(printable(grid.title)), title_justify="left")
    wide = len(grid.header) > _WIDE
    if wide:
        table.box, table.padding = _TIGHT, (0, 0, 0, 1)
        table.show_edge = table.pad_edge = False
    for index, title in enumerate(grid.header):
        justify: Literal["left", "right"] = "right" if index else "left"
        heading = printable(title).replace(" ", "\n") if wide else printable(title)
        table.add_column(Text(heading), justify=justify, overflow="fold")
    for index, row in enumerate(grid.rows):
        cells = (Text(printable(cell)) for cell in row)
        style = "bold" if index == grid.strong else "dim" if index in grid.faint else None
        table.add_row(*cells, style=style)
    return table


def report_view(
    report: Report, metrics: Sequence[Mapping[str, Any]] = (), *, samples: bool = True
) -> Group:
    """All that the report holds: what was required of the arms, samples, tables, verdicts, costs,
    and what to doubt at the end."""
    evaluation = report.evaluation
    required = required_verdicts(evaluation)
    parts: list[RenderableType] = [said_lines(required)] if required else []
    if evaluation is not None:
        parts += [_sample_panel(sample) for sample in evaluation.samples if samples]
        grids = [arms_grid(evaluation), texts_grid(evaluation)]
        if evaluation.judge is not None:
            grids.append(judge_grid(evaluation.judge))
        parts += [grid_table(grid) for grid in grids if grid]
    parts.append(verdict_lines(evaluation))
    if evaluation is not None and evaluation.safety is not None:
        parts.append(safety_tables(evaluation.safety))
    if report.headroom is not None:
        parts.append(headroom_tables(report.headroom.headroom, report.headroom.goals))
    if report.bound is not None:
        parts.append(bound_tables(report.bound))
    parts.append(costs_table(report))
    doubts = [f"warning: {printable(f.text)}" for f in find_warnings(report, metrics)]
    return Group(*parts, *([Text("\n".join(doubts), style="yellow")] if doubts else []))


def verdict_lines(evaluation: Evaluation | None) -> Text:
    said = [headline(evaluation)]
    if evaluation is not None:
        said += verdicts(evaluation)
        said += [] if evaluation.judge is None else judge_verdicts(evaluation.judge)
    text = said_lines(said)
    if evaluation is not None:
        search = evaluation.static_search
        found = [] if search is None else [search_sentence(search)]
        for sentence in [*gap_sentences(evaluation), *found]:
            text.append("\n" + printable(sentence))
    return text


def said_lines(said: Sequence[Verdict]) -> Text:
    return Text("\n").join(Text(printable(one.text), style=TONES[one.tone]) for one in said)


def safety_tables(safety: SafetyResult) -> Group:
    grids = (safety_grid(safety), paired_safety_grid(safety))
    words = [Text(line) for line in jailbreak_words(safety)]
    return Group(*(grid_table(grid) for grid in grids if grid), *words)


def headroom_tables(headroom: Headroom, goals: GoalsForecast | None = None) -> Group:
    grids = (frontier_grid(headroom), best_of_n_grid(headroom), goals_grid(goals))
    words = Text("\n".join([*headroom_words(headroom), *goals_words(goals)]))
    return Group(*(grid_table(grid) for grid in grids if grid), words)


def mix_tables(mix: MixReport) -> Group:
    return Group(grid_table(mix_grid(mix)), Text("\n".join(mix_words(mix))))


def bound_tables(bound: BoundReport) -> Group:
    grids = (bound_grid(bound), rewards_grid(bound))
    return Group(*(grid_table(grid) for grid in grids), said_lines(bound_verdicts(bound)))


def costs_table(report: Report) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in costs(report):
        table.add_row(Text(printable(what)), Text(value))
    return table


def _sample_panel(sample: Sample) -> Panel:
    text = Text()
    for key, arm in in_order(sample.arms).items():
        response = f"response (reward {number(arm.reward)})"
        for label, written in (("rewrite", arm.rewrite), (response, arm.response)):
            if written is not None:
                text.append(printable(f"{key} {label}: "), style="bold")
                text.append(printable(written).strip() + "\n")
    text.rstrip()
    title = Text(" ".join(printable(sample.prompt).split()))
    return Panel(text, title=title, title_align="left")
