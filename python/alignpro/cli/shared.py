"""The application that commands join, the options they share, and how an error is said."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from alignpro.files import being_written
from alignpro.files import write_json as write_whole
from alignpro.interrupts import exit_status, interruptible
from alignpro.optional import import_for, is_installed
from alignpro.run_directory import (
    check_kind,
    check_run_dir,
    command_of,
    error_notes,
    one_line,
    open_run_dir,
    run_of_config,
)

if TYPE_CHECKING:
    from alignpro.config import PreferConfig, SelfImproveConfig, SftConfig, TrainConfig

# Exit codes. Not met: a difference between arms that --require asks for is not shown. Interrupted:
# `exit_status`.
DEFECT, BAD_INPUT, NOT_MET = 1, 2, 3

# In the order of a user's work, which is that of --help.
_ORDER = (
    *("quickstart", "init", "config", "headroom", "sft", "train", "prefer"),
    "self-improve",
    *("reward", "evaluate", "safety", "mix", "report", "extract"),
    *("generate", "serve", "bound", "theory", "info", "profile", "bench"),
)


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            refused: Any = error  # typer has no public name for that of an unknown option
            option = getattr(refused, "option_name", "")
            if option and hasattr(refused, "possibilities"):
                say = _instead_of_option(refused.ctx.command, option)
                if say and not difflib.get_close_matches(
                    option, refused.possibilities or (), 1, 0.8
                ):
                    refused.message += f"; {say}"
                    refused.possibilities = None
            raise


def _instead_of_option(command: Any, option: str) -> str:
    """What to type for an option of other tools that is an argument here."""
    arguments = {parameter.name for parameter in command.params}
    if option == "--config" and "config" in arguments:
        return "the file of the configuration is the first argument"
    key = option.lstrip("-").replace("-", "_")
    return f"fields of the configuration are given as {key}=..." if "overrides" in arguments else ""


app = typer.Typer(
    name="alignpro",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        import alignpro

        typer.echo(f"alignpro {alignpro.__version__}")
        raise typer.Exit


@app.callback()
def _alignpro(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train a small prompter in front of a frozen language model."""


def examples(*lines: str) -> str:
    """The end of a command's help: commands as they are typed."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def key_values(such_as: str) -> Any:
    """The argument of a command that takes fields of its configuration; such_as: two of them."""
    return typer.Argument(
        metavar="[KEY=VALUE]...", help=f"Fields of the configuration, such as {such_as}."
    )


Overrides = Annotated[list[str] | None, key_values("seed=1 or prompter.model=smollm2")]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Write the numbers to this JSON file; see also --run."),
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Run to take models, adapters, templates, sampling and reward from, and to write the "
        "numbers to; key=value overrides them.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of threads; the default is the CPU quota.")
]
Config = Annotated[
    str | None,  # no Path, which would take "//" out of a first key=value
    typer.Argument(
        help="YAML file of the configuration, or the config.json of a run; every field has a "
        "default."
    ),
]
ModelName = Annotated[str, typer.Option(help="Path or name of the model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the run directory.")]
AllowChanges = Annotated[
    bool,
    typer.Option(
        "--allow-changes",
        help="Resume although models, adapter, template or reward are others than the run began "
        "with.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what the run would hold in memory, and stop.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run that is in the run directory.")
]
T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., None])


def one_line_errors(command: Command) -> Command:
    """Bad input is one line on stderr and exit code 2; ALIGNPRO_DEBUG=1 shows the traceback. A
    SIGTERM or SIGHUP interrupts as Ctrl-C does.

    An error that nobody raised on purpose is a defect, and keeps its traceback: in the error.log of
    a run, where the one line says so, else on stderr.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible():
                command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            said = "; ".join([f"interrupted {interrupt}".rstrip(), *error_notes(interrupt)])
            typer.echo(f"alignpro: {said}", err=True)
            raise typer.Exit(exit_status(interrupt)) from None
        except BrokenPipeError:
            # The reader left (alignpro generate | head): nothing to say, and nowhere to say it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if isinstance(error, typer.Exit) or os.environ.get("ALIGNPRO_DEBUG") == "1":
                raise
            notes = error_notes(error)
            on_purpose = _raised_on_purpose(error)
            if not on_purpose and not notes:
                raise
            typer.echo("alignpro: " + "; ".join([one_line(error), *notes]), err=True)
            raise typer.Exit(BAD_INPUT if on_purpose else DEFECT) from None

    return run  # type: ignore[return-value]


def _raised_on_purpose(error: Exception) -> bool:
    """Whether it says something about the input or the machine: an error of the system's, of a
    class of ours, or of bad input that this package itself raises."""
    if isinstance(error, (OSError, ImportError)) or type(error).__module__.startswith("alignpro"):
        return True
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__")).split(".")[0] == "alignpro"
    return ours and isinstance(error, (ValueError, RuntimeError))


def check_new(file: Path | None) -> None:
    if file is not None and file.exists():
        raise FileExistsError(f"{file}: is there already; name another file, or delete it")
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder; make it first")


def write_json(file: Path | None, report: Any) -> None:
    """Write plain values, or the results of an evaluation."""
    if file is not None:
        from alignpro.evaluate.results import to_json

        write_whole(file, to_json(report))


@contextlib.contextmanager
def writing(run: Path | None, *files: Path | None) -> Iterator[None]:
    """Hold what a command writes, for it alone: new files, and the run that they lie in.

    Raises:
        FileExistsError: another process does, or such a file is there. FileNotFoundError: a folder.
    """
    with contextlib.ExitStack() as held:
        if run is not None and run in {file.parent for file in files if file is not None}:
            held.enter_context(open_run_dir(run, resume=True).held())
        for file in files:
            if file is not None and not file.parent.is_dir():
                raise FileNotFoundError(f"{file.parent}: no such folder; make it first")
        held.enter_context(being_written(*files))
        for file in files:
            check_new(file)
        yield


def read_settings(
    cls: type[T],
    config: str | Path | None,
    overrides: list[str] | None,
    default: Path | None = None,
    run: Path | None = None,
    base: T | None = None,
) -> T:
    """The file is optional, so a first key=value arrives in its place. The config.json of a run is
    of the directory that it lies in, which may be a copy.

    default: the file where none is given; None: the defaults of ``cls``.
    run: what is not given is as in that run. base: or as in this.
    """
    from alignpro.config import load_yaml

    settings, file = list(overrides or []), None if config is None else Path(config)
    if file is not None and "=" in str(config) and not file.exists():
        file, settings = None, [str(config), *settings]
    home = run_of_config(file)
    if home is not None and "run_dir" in getattr(cls, "__dataclass_fields__", {}):
        check_kind(home, cls)
        settings = [f"run_dir={json.dumps(str(home))}", *settings]
    if run is not None:
        from alignpro.evaluate.of_run import settings_of_run

        base = settings_of_run(cls, run)  # type: ignore[type-var]
    options: T = load_yaml(cls, file or default, settings, base=base)
    return options


def data_given(source: str) -> str:
    """The data that a command's first argument names, as key=value; or what is that already."""
    given = "=" in source and not Path(source).exists()
    return source if given else f"data.path={json.dumps(source)}"


def check_inputs(options: Any, *, resume: bool = False) -> None:
    """Refuse files, models, adapters, schemas and rewards that are surely not there, before torch
    is imported, which takes seconds. resume: a run keeps the adapter that it began with.

    Raises ValueError or FileNotFoundError.
    """
    from alignpro.config import ModelConfig
    from alignpro.config.data import Source
    from alignpro.config.extract import SchemaConfig
    from alignpro.config.fields import is_noted
    from alignpro.config.keys import type_hints
    from alignpro.data.load import find_file
    from alignpro.models.resolve import path_or_name
    from alignpro.rewards.build import check_reward

    hints = type_hints(type(options))
    for key, value in vars(options).items():
        if key == "prompter" and getattr(options, "policy", None) == "target":
            continue  # takes no part
        if isinstance(value, ModelConfig):
            if value.endpoint is None:
                path_or_name(value.name)
            if value.adapter is not None and not resume:
                from alignpro.models.adapter_files import adapter_folder

                try:
                    adapter_folder(value.adapter)
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{key}.adapter: {error}") from None
        elif isinstance(value, Source):
            if value.path is not None:
                find_file(value)
        elif isinstance(value, SchemaConfig):
            from alignpro.extract.schema import read_schema

            read_schema(value.path)
        elif is_noted(hints[key], "reward") and value is not None:
            check_reward(value)
        elif is_dataclass(value):
            check_inputs(value, resume=resume)


def training_settings(
    cls: type[T],
    config: str | None,
    overrides: list[str] | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> T:
    """`read_settings` of a command that trains to a run directory, checked by `check_inputs`.
    dry_run: nothing is trained, whatever is in that directory."""
    needs_torch(command_of(cls))
    options = read_settings(cls, config, overrides)
    if not dry_run:
        check_run_dir(options.run_dir, resume=resume, overwrite=overwrite)  # type: ignore[attr-defined]
    check_inputs(options, resume=resume or dry_run)
    return options


def say_memory(options: SftConfig | PreferConfig | SelfImproveConfig | TrainConfig) -> None:
    """The dry run of a fit: what `price_fit` says."""
    from rich.console import Console

    from alignpro.report.progress import Bars

    with Bars("loading torch"):
        from alignpro.price.fit import price_fit
        from alignpro.price.tables import fit_tables

        report = price_fit(options)
    Console().print(fit_tables(report))


def needs_torch(command: str) -> None:
    if not is_installed("torch"):
        import_for(command, "torch")


def needs_serve(command: str) -> None:
    for package in ("starlette", "uvicorn", "httptools", "aiohttp", "prometheus_client"):
        import_for(command, package, "alignpro[serve]")
