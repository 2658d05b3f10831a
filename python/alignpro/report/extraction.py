"""What an extraction is worth, for the terminal."""

from __future__ import annotations

from rich.console import Group

from alignpro.evaluate.results import ExtractReport, Interval
from alignpro.report.grids import Grid, usage_words
from alignpro.report.tables import grid_table
from alignpro.report.words import interval, number, share_interval

_SHOWN = 12


def extract_view(report: ExtractReport) -> Group:
    """Shares with their intervals, and which checks failed most."""
    most = report.config["attempts"] if report.config else 1
    rows = [_row("verified", report.verified)]
    if most > 1:
        rows.append(_row("verified by the first draw", report.verified_first))
    if report.verified_gain is not None and most > 1:
        gain = report.verified_gain
        rows.append(("what further draws add", number(gain.mean, sign=True), interval(gain.ci95)))
    if report.exact is not None:
        rows.append(_row("right in every value", report.exact))
    if report.exact_of_verified is not None:
        rows.append(_row("right in every value, of the verified", report.exact_of_verified))
    if report.f1 is not None:
        rows.append(("F1 of values", number(report.f1.mean), interval(report.f1.ci95)))
        rows += [
            ("precision of values", number(report.precision), ""),
            ("recall of values", number(report.recall), ""),
        ]
    title = f"{report.texts} texts, {report.records} records, {report.attempts:.2f} draws a text"
    worst = list(report.violations.items())[:_SHOWN]
    grids = [
        Grid(title, ("", "mean", "95% interval"), rows, strong=0),
        Grid("Violations", ("check", "times"), [(name, str(n)) for name, n in worst]),
    ]
    tables = [grid_table(grid) for grid in grids if grid]
    more = []
    if report.failed_texts:
        more.append(f"{report.failed_texts} more texts without an answer, left out")
    if report.target_usage is not None:
        more.append(f"target: {usage_words(report.target_usage)}")
    return Group(*tables, *more)


def _row(name: str, value: Interval) -> tuple[str, str, str]:
    return name, number(value.mean), share_interval(value.ci95)
