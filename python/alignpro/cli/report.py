"""A run's report, built again from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import app, examples, one_line_errors


@app.command(
    epilog=examples(
        "alignpro report alignpro-run",
        "alignpro report alignpro-run --evaluation evaluation.json --output full.html",
    )
)
@one_line_errors
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory of a run, or of its files.")
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What evaluate wrote; the default is the run's evaluation.json."),
    ] = None,
    headroom: Annotated[
        Path | None,
        typer.Option(help="What headroom wrote; the default is the run's headroom.json."),
    ] = None,
    bound: Annotated[
        Path | None, typer.Option(help="What bound wrote; the default is the run's bound.json.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The report to write; the default is the run's report.html.")
    ] = None,
) -> None:
    """Build report.html from what a run's directory holds."""
    from rich.console import Console

    from alignpro.report.build import build_report
    from alignpro.report.progress import Bars
    from alignpro.report.tables import report_view

    with Bars("building the report"):
        built = build_report(run, evaluation=evaluation, headroom=headroom, bound=bound, out=output)
    Console().print(report_view(built.report, built.metrics, samples=False))
    typer.echo(f"report: {built.path}")
