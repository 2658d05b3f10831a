"""Everything that a report holds, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from alignpro.report.grids import arms_grid, judge_grid, texts_grid
from alignpro.report.tables import (
    costs_table,
    grid_table,
    samples_panel,
    verdict_lines,
    warning_lines,
)
from alignpro.report.theory import bound_tables, headroom_tables


def report_view(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> Group:
    """All that the report holds: samples, tables, verdicts, costs, and what to doubt at the end."""
    parts: list[RenderableType] = [samples_panel(report.get("samples") or [])]
    grids = (arms_grid(report), texts_grid(report), judge_grid(report.get("judge") or {}))
    parts += [grid_table(grid) for grid in grids if grid]
    parts.append(verdict_lines(report))
    if report.get("headroom"):
        parts.append(headroom_tables(report["headroom"]))
    if report.get("bound"):
        parts.append(bound_tables(report["bound"]))
    parts.append(costs_table(report))
    doubts = warning_lines(report, metrics)
    return Group(*parts, *([doubts] if doubts else []))
