"""`alignpro mix`: one prompter of several, each trained for its own goal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import (
    Config,
    app,
    examples,
    key_values,
    needs_torch,
    one_line_errors,
    read_settings,
    say_memory,
)
from alignpro.run_directory import CONFIG, configs_of_runs


@app.command(
    epilog=examples(
        "alignpro mix runs=[kind,brief] --output mixed",
        "alignpro mix runs=[kind,brief] data=prompts.csv sampling=sequence --output mixed",
        "alignpro mix runs=[kind] kl_coef=0.1 --output softer",
        "alignpro mix runs=[kind,brief] --output mixed --distill",
    )
)
@one_line_errors
def mix(
    config: Config = None,
    overrides: Annotated[list[str] | None, key_values("seed=1 or kl_coef=0.1")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write mixture.json to this folder, which may then be named as an adapter, and "
            "the prompters as one LoRA to its adapter/."
        ),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill", help="Train one prompter from the mixture, into distilled/ of it."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what --distill would hold in memory, and stop; mix nothing."
        ),
    ] = False,
) -> None:
    """Make one prompter of several, trained each for its own goal.

    It serves the worst-off goal best; no target is asked, and without --distill nothing is trained.
    """
    from alignpro.config import MixConfig

    options = read_settings(MixConfig, config, overrides)
    if distill:
        needs_torch("mix --distill")
        options = replace(options, weights=options.weights or "whole")
        if output is None:
            raise ValueError("--distill: trains what --output FOLDER will hold; name a folder")
    runs = configs_of_runs(options.runs)  # refused before what reads models is imported
    from alignpro.evaluate.mix import is_mixed, load_inputs, run_mix

    inputs = load_inputs(options, runs)
    wanted = None
    if distill and output is not None:
        from alignpro.train.distill import distill_config

        wanted = distill_config(output, inputs.runs)
    if dry_run:
        if wanted is None:
            raise ValueError("--dry-run: says what --distill would hold; add --distill")
        return say_memory(wanted)
    if wanted is not None and (begun := Path(wanted.run_dir) / CONFIG).is_file():
        raise FileExistsError(
            f"{wanted.run_dir}: is there already; it goes on with: alignpro train {begun} "
            "--resume; or name another folder"
        )
    from rich.console import Console

    from alignpro.report.progress import Bars
    from alignpro.report.tables import mix_tables

    if wanted is not None and output is not None and is_mixed(options, inputs, output):
        typer.echo(f"{output}: mixed before, and distilled now")
    else:
        with Bars("loading data and models") as bars:
            report = run_mix(options, output, bars.show, inputs=inputs)
        Console().print(mix_tables(report))
    if wanted is not None:
        from alignpro.report.progress import TrainBar
        from alignpro.train.run import run_train

        with Bars("loading data and models") as bars:
            trained = run_train(wanted, callbacks=[TrainBar(bars)], on_progress=bars.show)
        typer.echo(f"adapter: {trained.run_dir / 'adapter'}")
