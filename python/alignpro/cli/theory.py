"""`alignpro headroom`, `bound` and `theory`: what prompting can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import (
    Config,
    Output,
    Overrides,
    Run,
    app,
    check_inputs,
    examples,
    one_line_errors,
    read_settings,
    write_json,
    writing,
)

_POINTS = 13  # of a curve

theory = typer.Typer(help="Solve a model that is small enough to solve.", no_args_is_help=True)
app.add_typer(theory, name="theory")


@app.command(
    epilog=examples(
        "alignpro headroom reward=topic num_prompts=16",
        "alignpro headroom data=prompts.csv --samples samples.jsonl",
    )
)
@one_line_errors
def headroom(
    config: Config = None,
    overrides: Overrides = None,
    run: Run = None,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the frontier to this file, PNG or SVG by its suffix.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of rewrites, responses and rewards: read where the file exists, else "
            "written."
        ),
    ] = None,
) -> None:
    """Say before training what a prompter could gain.

    The samples are those of the untuned prompter.
    """
    from alignpro.config import HeadroomConfig

    options = read_settings(HeadroomConfig, config, overrides, run=run)
    output = run / "headroom.json" if output is None and run is not None else output
    written = [file for file in (output, plot, samples) if file is not None]
    if len(set(written)) < len(written):
        raise ValueError("--output, --plot and --samples: expected a file for each, got one twice")
    if plot is not None:
        from alignpro.report.svg import check_plot_file

        check_plot_file(plot)
    if samples is None or not samples.exists():
        check_inputs(options)
    from rich.console import Console

    from alignpro.evaluate.headroom import run_headroom
    from alignpro.report.frontier import frontier_png
    from alignpro.report.grids import usage_words
    from alignpro.report.progress import Bars
    from alignpro.report.tables import headroom_tables

    drawn = None if samples is None or samples.exists() else samples
    with writing(run, output, plot, drawn):
        with Bars("loading data and models") as bars:
            report = run_headroom(
                options, samples=samples, output=output, run=run, on_progress=bars.show
            )
        write_json(output, report)
        if plot is not None:
            frontier_png(report.headroom, plot)
    Console().print(headroom_tables(report.headroom, report.goals))
    if report.target_usage is not None:
        typer.echo(f"target: {usage_words(report.target_usage)}")


@app.command(
    epilog=examples(
        "alignpro bound reward=topic num_prompts=16",
        "alignpro bound trained=alignpro-run/adapter --output bound.json",
    )
)
@one_line_errors
def bound(
    config: Config = None, overrides: Overrides = None, run: Run = None, output: Output = None
) -> None:
    """Say how far prompting falls short of tuning the target.

    The bound term by term, and beside it the gap that is measured.
    """
    from alignpro.config import BoundConfig

    options = read_settings(BoundConfig, config, overrides, run=run)
    check_inputs(options)
    output = run / "bound.json" if output is None and run is not None else output
    from rich.console import Console

    from alignpro.evaluate.bound import run_bound
    from alignpro.report.grids import usage_words
    from alignpro.report.progress import Bars
    from alignpro.report.tables import bound_tables

    with writing(run, output):
        with Bars("loading data and models") as bars:
            report = run_bound(options, output=output, run=run, on_progress=bars.show)
        write_json(output, report)
    Console().print(bound_tables(report))
    if report.target_usage is not None:
        typer.echo(f"target: {usage_words(report.target_usage)}")


@theory.command(
    name="prompt-attention",
    epilog=examples(
        "alignpro theory prompt-attention --plot prompt-attention.png",
        "alignpro theory prompt-attention --tokens 200 --relevant 20 --signal 0.3",
    ),
)
@one_line_errors
def prompt_attention(
    tokens: Annotated[int, typer.Option(max=2**24, help="Tokens of an input.")] = 800,
    relevant: Annotated[int, typer.Option(help="Relevant ones of them.")] = 80,
    relevance: Annotated[float, typer.Option(help="Length of what makes a token relevant.")] = 2.0,
    signal: Annotated[float, typer.Option(help="Length of what tells the label.")] = 0.15,
    noise: Annotated[float, typer.Option(help="Standard deviation of the other tokens.")] = 1.0,
    inputs: Annotated[int, typer.Option(min=1, help="Inputs that are drawn for a point.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the inputs.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves to this file, PNG or SVG by its suffix.")
    ] = None,
) -> None:
    """Show how sharp a prompt should be: what it gains on relevant tokens, and what it loses.

    The error and the attention on relevant tokens by kappa, the length of the prompt, as predicted
    and as measured on inputs that are drawn.
    """
    if plot is not None:
        from alignpro.report.svg import check_plot_file

        check_plot_file(plot)
    import numpy as np
    from rich.console import Console

    from alignpro.report.attention import sharpness_figure, sharpness_grid
    from alignpro.report.progress import Bars
    from alignpro.report.tables import grid_table
    from alignpro.theory.prompt_attention import AttentionData, at_sharpness

    data = AttentionData(tokens, relevant, 2, relevance, signal, noise)
    random = np.random.default_rng(seed)
    points = []
    with writing(None, plot):
        with Bars() as bars:
            for kappa in np.linspace(0.0, 3 * data.best_kappa, _POINTS):
                points.append(at_sharpness(data, float(kappa), inputs=inputs, random=random))
                bars.show("drawing inputs", len(points), _POINTS)
        if plot is not None:
            sharpness_figure(data, points, plot)
    Console().print(grid_table(sharpness_grid(points)))
    best = data.gain(data.best_kappa)
    typer.echo(
        f"By the formula the best is kappa {data.best_kappa:.3g}: {best:.3g} times the "
        "signal-to-noise ratio of no prompt."
    )
