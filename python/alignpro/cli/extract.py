"""`alignpro extract`: records out of texts, verified."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.shared import (
    Overrides,
    Threads,
    app,
    check_inputs,
    check_new,
    data_given,
    examples,
    one_line_errors,
    read_settings,
    write_json,
    writing,
)
from alignpro.run_directory import config_of_run


@app.command(
    epilog=examples(
        "alignpro extract texts.jsonl --schema mine.json --output records.jsonl",
        "alignpro extract reactions data.split=heldout --schema reaction_flat --run taught",
        "alignpro extract --schema mine.json --show-template",
    )
)
@one_line_errors
def extract(
    texts: Annotated[
        str | None,
        typer.Argument(help="Texts: a file with a column text, or a packaged name."),
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        str | None,
        typer.Option(help="Schema: a JSON file, or reaction, reaction_flat, recipe or meeting."),
    ] = None,
    attempts: Annotated[
        int | None, typer.Option(min=1, help="Most draws for a text; the default is 4.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="How the model writes a record: json or lines."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Path or name of the target.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="PEFT folder of the target's adapter.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run to take models, adapters and schema from; key=value overrides."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write a row for each text to this JSONL file; else to standard output."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the numbers to this JSON file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the configuration.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    threads: Threads = None,
    show_template: Annotated[
        bool, typer.Option("--show-template", help="Print what the target reads, and stop.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read schema and texts, say what it would take, and stop."),
    ] = False,
) -> None:
    """Extract records from texts by a schema, and verify them.

    A frozen model writes a record for each text, anew until it passes the schema's checks.
    """
    from alignpro.config import ExtractConfig

    options = {
        "schema.path": schema,
        "schema.format": form,
        "attempts": attempts,
        "target.model": model,
        "target.adapter": adapter,
        "seed": seed,
        "threads": threads,
    }
    first = [] if texts is None else [data_given(texts)]
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    base = None
    if run is not None:
        config_of_run(run)  # refused before what reads models is imported
        from alignpro.evaluate.extract import extract_of_run

        base = extract_of_run(run)
    settings = read_settings(ExtractConfig, config, [*first, *(overrides or []), *given], base=base)
    if show_template:
        from alignpro.extract.schema import read_schema

        if settings.schema is None:
            raise ValueError("--show-template: expected --schema, or a run with one")
        typer.echo(read_schema(settings.schema.path).template(settings.schema.format))
        return
    check_new(report)
    check_inputs(settings)
    from alignpro.evaluate.extract import line_of, read_inputs, run_extract

    read, record_form, rows = read_inputs(settings)
    if dry_run:
        most, tokens = len(rows) * settings.attempts, settings.response.max_new_tokens
        typer.echo(
            f"{len(rows)} texts, {most} draws at most of {tokens} tokens; "
            f"schema {read.name}: {len(read.root.fields)} fields, {len(read.checks)} checks, "
            f"as {record_form}"
        )
        return
    from rich.console import Console

    from alignpro.report.extraction import extract_view
    from alignpro.report.progress import Bars

    with writing(None, output, report):
        with Bars("loading data and models") as bars:
            written, numbers = run_extract(settings, output=output, on_progress=bars.show)
        write_json(report, numbers)
    if output is None:
        for row in written:
            typer.echo(line_of(row))
    Console(stderr=output is None, file=None if output is None else sys.stdout).print(
        extract_view(numbers)
    )
