"""`alignpro headroom` and `alignpro bound`: what prompting can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import (
    Config,
    Json,
    Overrides,
    Run,
    app,
    one_line_errors,
    read_settings,
    write_json,
    writing,
)
from alignpro.optional import is_installed


@app.command()
@one_line_errors
def headroom(
    config: Config = None,
    overrides: Overrides = None,
    run: Run = None,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier to this PNG file.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of rewrites, responses and rewards: read where the file exists, else "
            "written."
        ),
    ] = None,
) -> None:
    """What a prompter could gain, from samples of the untuned one, before training."""
    from alignpro.config import HeadroomConfig

    options = read_settings(HeadroomConfig, config, overrides, run=run)
    json_file = run / "headroom.json" if json_file is None and run is not None else json_file
    written = [file for file in (json_file, plot, samples) if file is not None]
    if len(set(written)) < len(written):
        raise ValueError("--json, --plot and --samples: expected a file for each, got one twice")
    if plot is not None and not is_installed("matplotlib"):
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or leave it out")
    from rich.console import Console

    from alignpro.evaluate.headroom import run_headroom
    from alignpro.report.frontier import frontier_png
    from alignpro.report.grids import usage_words
    from alignpro.report.progress import Bars
    from alignpro.report.tables import headroom_tables

    drawn = None if samples is None or samples.exists() else samples
    with writing(run, json_file, plot, drawn):
        with Bars() as bars:
            report = run_headroom(options, samples=samples, run=run, on_progress=bars.show)
        write_json(json_file, report)
        if plot is not None:
            frontier_png(report.headroom, plot)
    Console().print(headroom_tables(report.headroom))
    if report.target_usage is not None:
        typer.echo(f"target: {usage_words(report.target_usage)}")


@app.command()
@one_line_errors
def bound(
    config: Config = None, overrides: Overrides = None, run: Run = None, json_file: Json = None
) -> None:
    """How far a prompted target may fall short of a tuned one, and how far it does."""
    from alignpro.config import BoundConfig

    options = read_settings(BoundConfig, config, overrides, run=run)
    json_file = run / "bound.json" if json_file is None and run is not None else json_file
    from rich.console import Console

    from alignpro.evaluate.bound import run_bound
    from alignpro.report.progress import Bars
    from alignpro.report.tables import bound_tables

    with writing(run, json_file):
        with Bars() as bars:
            report = run_bound(options, output=json_file, run=run, on_progress=bars.show)
        write_json(json_file, report)
    Console().print(bound_tables(report))
