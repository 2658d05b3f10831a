"""`alignpro theory prompt-attention`: the small model of what a prompt does, solved and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import app, examples, one_line_errors, writing
from alignpro.optional import is_installed

_POINTS = 13

theory = typer.Typer(help="Solve a model that is small enough to solve.", no_args_is_help=True)
app.add_typer(theory, name="theory")


@theory.command(
    name="prompt-attention",
    epilog=examples(
        "alignpro theory prompt-attention --plot prompt-attention.png",
        "alignpro theory prompt-attention --tokens 200 --relevant 20 --signal 0.3",
    ),
)
@one_line_errors
def prompt_attention(
    tokens: Annotated[int, typer.Option(help="Tokens of an input.")] = 800,
    relevant: Annotated[int, typer.Option(help="Relevant ones of them.")] = 80,
    relevance: Annotated[float, typer.Option(help="Length of what makes a token relevant.")] = 2.0,
    signal: Annotated[float, typer.Option(help="Length of what tells the label.")] = 0.15,
    noise: Annotated[float, typer.Option(help="Standard deviation of the other tokens.")] = 1.0,
    inputs: Annotated[int, typer.Option(min=1, help="Inputs that are drawn for a point.")] = 4000,
    seed: Annotated[int, typer.Option(help="Random seed of the inputs.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves to this file, PNG or SVG by its suffix.")
    ] = None,
) -> None:
    """Show how sharp a prompt should be: what it gains on relevant tokens, and what it loses.

    The error and the attention on relevant tokens by kappa, the length of the prompt, as predicted
    and as measured on inputs that are drawn.
    """
    if plot is not None and not is_installed("matplotlib"):
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or leave it out")
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
