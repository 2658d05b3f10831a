"""The application that commands join, the options they share, and how an error is said."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from alignpro.files import write_json as write_whole
from alignpro.optional import is_installed
from alignpro.run_directory import error_notes, one_line

# Exit codes. Not met: a difference between arms that --require asks for is not shown.
DEFECT, BAD_INPUT, NOT_MET, INTERRUPTED = 1, 2, 3, 130

# In the order of a user's work, which is that of --help.
_ORDER = (
    *("quickstart", "init", "config", "headroom", "sft", "train", "evaluate", "report"),
    *("generate", "bound", "info", "profile", "bench"),
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    name="alignpro",
    cls=_InOrder,
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


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Fields of the configuration, such as seed=1 or prompter.model=smollm2.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Write the numbers to this JSON file.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of threads; the default is the CPU quota.")
]
Config = Annotated[
    Path | None, typer.Argument(help="YAML file of the configuration; every field has a default.")
]
ModelName = Annotated[str, typer.Option(help="Path or name of the model.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run that is in the run directory.")
]
T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., None])


def one_line_errors(command: Command) -> Command:
    """Bad input is one line on stderr and exit code 2; ALIGNPRO_DEBUG=1 shows the traceback.

    An error that nobody raised on purpose is a defect, and keeps its traceback: in the error.log of
    a run, where the one line says so, else on stderr.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            typer.echo(f"alignpro: interrupted {interrupt}".rstrip(), err=True)
            raise typer.Exit(INTERRUPTED) from None
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
        raise FileExistsError(f"{file}: is there already; name another file")
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder; make it first")


def write_json(file: Path | None, report: Any) -> None:
    """Write plain values, or the results of an evaluation."""
    if file is not None:
        from alignpro.evaluate.results import to_json

        write_whole(file, to_json(report))


def read_settings(
    cls: type[T], config: Path | None, overrides: list[str] | None, default: Path | None = None
) -> T:
    """The file is optional, so a first key=value arrives in its place.

    default: the file where none is given; None: the defaults of ``cls``.
    """
    from alignpro.config import load_yaml

    settings = list(overrides or [])
    if config is not None and "=" in str(config) and not config.exists():
        config, settings = None, [str(config), *settings]
    return load_yaml(cls, config or default, settings)


def needs_torch(command: str) -> None:
    if not is_installed("torch"):
        raise ImportError(
            f"{command} trains, which needs torch: pip install -c constraints.txt '.[train]'"
        )
