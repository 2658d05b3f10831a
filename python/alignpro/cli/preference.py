"""`alignpro prefer`, `self-improve` and `reward fit`: learning from pairs of which one is
preferred."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import (
    AllowChanges,
    Config,
    DryRun,
    Overrides,
    Overwrite,
    Resume,
    app,
    check_inputs,
    data_given,
    examples,
    key_values,
    needs_torch,
    one_line_errors,
    read_settings,
    say_memory,
    training_settings,
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
    dry_run: DryRun = False,
) -> None:
    """Train on pairs of which one was preferred."""
    from alignpro.config import PreferConfig

    options = training_settings(
        PreferConfig,
        config,
        overrides,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if dry_run:
        return say_memory(options)
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


@app.command(
    epilog=examples(
        "alignpro self-improve run_dir=improved",
        "alignpro self-improve data=passages.jsonl iterations=2 calibration=0.5",
        "alignpro self-improve --dry-run",
    )
)
@one_line_errors
def self_improve(
    config: Config = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = False,
    dry_run: DryRun = False,
) -> None:
    """Train on pairs that a policy makes of its own answers."""
    from alignpro.config import SelfImproveConfig

    options = training_settings(
        SelfImproveConfig,
        config,
        overrides,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if dry_run:
        return say_memory(options)
    from rich.console import Console

    from alignpro.report.progress import Bars, show_preference_row
    from alignpro.report.self_improve import round_line, rounds_view

    with Bars("loading data and model") as bars:
        from alignpro.train.self_improve import run_self_improve

        rows = run_self_improve(
            options,
            resume=resume,
            overwrite=overwrite,
            allow_changes=allow_changes,
            on_step=lambda row: show_preference_row(bars, row, options.steps),
            on_progress=bars.show,
            on_round=lambda row: bars.say(round_line(row)),
        )
    Console().print(rounds_view(rows))
    typer.echo(f"adapter: {Path(options.run_dir) / 'adapter'}")


reward = typer.Typer(help="Make a reward from preferences.", no_args_is_help=True)
app.add_typer(reward, name="reward")


@reward.command(
    "fit",
    epilog=examples(
        "alignpro reward fit pairs.jsonl --output kindness",
        "alignpro reward fit warm_tones model=smollm2 heldout={} --output warmth",
    ),
)
@one_line_errors
def reward_fit(
    pairs: Annotated[
        str, typer.Argument(help="Pairs: a file, a packaged name, or a data set on the hub.")
    ],
    overrides: Annotated[list[str] | None, key_values("seed=1 or model=smollm2")] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the reward, which is made.")
    ] = Path("alignpro-reward"),
) -> None:
    """Fit a linear reward on a frozen model's states to pairs.

    It is then a reward by the name learned:FOLDER.
    """
    needs_torch("reward fit")
    from alignpro.config import RewardFitConfig

    options = read_settings(RewardFitConfig, None, [data_given(pairs), *(overrides or [])])
    check_inputs(options)
    from rich.console import Console

    from alignpro.report.learned import reward_view
    from alignpro.report.progress import Bars

    with Bars("loading data and model") as bars:
        from alignpro.train.reward_fit import run_reward_fit

        fit = run_reward_fit(options, output, bars.show)
    Console().print(reward_view(fit))
    typer.echo(f"reward: learned:{output}")
