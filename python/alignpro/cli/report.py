"""A run's report, built again from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import app, one_line_errors


@app.command()
@one_line_errors
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run's directory, or one with its files")],
    evaluation: Annotated[
        Path | None, typer.Option(help="what evaluate wrote; default: evaluation.json there")
    ] = None,
    headroom: Annotated[
        Path | None, typer.Option(help="what headroom wrote; default: headroom.json there")
    ] = None,
    bound: Annotated[
        Path | None, typer.Option(help="what bound wrote; default: bound.json there")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="default: report.html there")] = None,
) -> None:
    """Build report.html from what a run's directory holds."""
    from rich.console import Console

    from alignpro.report.build import build_report
    from alignpro.report.tables import report_view

    built = build_report(run_dir, evaluation=evaluation, headroom=headroom, bound=bound, out=out)
    Console().print(report_view(built.report, built.metrics, samples=False))
    typer.echo(f"report: {built.path}")
