"""`alignpro headroom`, `bound` and `mix`: what prompting can reach, and what several goals can."""

from __future__ import annotations

from dataclasses import replace
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
    key_values,
    needs_torch,
    one_line_errors,
    read_settings,
    say_memory,
    write_json,
    writing,
)
from alignpro.optional import is_installed
from alignpro.run_directory import CONFIG, config_of_run


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
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier to this PNG file.")] = None,
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
    if plot is not None and not is_installed("matplotlib"):
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or leave it out")
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
    runs = {Path(run): config_of_run(Path(run)) for run in options.runs}  # before any import
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
