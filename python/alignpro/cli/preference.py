"""`alignpro prefer`: training on pairs of which one was preferred."""

from __future__ import annotations

from pathlib import Path

import typer

from alignpro.cli.shared import (
    AllowChanges,
    Config,
    Overrides,
    Overwrite,
    Resume,
    app,
    examples,
    needs_torch,
    one_line_errors,
    read_settings,
)


@app.command(
    epilog=examples(
        "alignpro prefer prompter.adapter=alignpro-sft/adapter heldout={}",
        "alignpro prefer data=pairs.jsonl policy=target beta=0.05 steps=64",
    )
)
@one_line_errors
def prefer(
    config: Config = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = False,
) -> None:
    """Train on pairs of which one was preferred."""
    needs_torch("prefer")
    from alignpro.config import PreferConfig

    options = read_settings(PreferConfig, config, overrides)
    from alignpro.report.progress import Bars, show_preference_row

    with Bars("loading data and model") as bars:
        from alignpro.train.run import run_prefer

        run_prefer(
            options,
            resume=resume,
            overwrite=overwrite,
            allow_changes=allow_changes,
            on_step=lambda row: show_preference_row(bars, row, options.steps),
        )
    typer.echo(f"adapter: {Path(options.run_dir) / 'adapter'}")
