"""The command line. Commands import what they need when they run, so that --help is quick.

Long because a command is its list of options.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes

app = typer.Typer(
    name="alignpro",
    help="Train a small prompter in front of a frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as train.learning_rate=1e-4"),
]
bench = typer.Typer(help="Measure this machine, this package and its peers.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[Path | None, typer.Option("--json", help="write the numbers there")]
Threads = Annotated[int | None, typer.Option(min=1, help="default: the CPU quota")]
Config = Annotated[Path | None, typer.Argument(help="YAML file; without it, the defaults")]
BenchModel = Annotated[str, typer.Option(help="path or name")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete the run that is there")]
Command = TypeVar("Command", bound=Callable[..., None])


def one_line_errors(command: Command) -> Command:
    """Bad input is one line on stderr and exit code 2; ALIGNPRO_DEBUG=1 shows the traceback."""

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
        except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
            if isinstance(error, typer.Exit) or os.environ.get("ALIGNPRO_DEBUG") == "1":
                raise
            typer.echo(f"alignpro: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(BAD_INPUT) from None

    return run  # type: ignore[return-value]


@app.command()
@one_line_errors
def quickstart(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    steps: Annotated[int | None, typer.Option(help="of reinforcement learning")] = None,
    prompts: Annotated[int | None, typer.Option(help="held-out prompts to evaluate on")] = None,
    model: Annotated[str | None, typer.Option(help="path or name")] = None,
    run_dir: Annotated[str | None, typer.Option(help="a number is added while it is taken")] = None,
    threads: Annotated[int | None, typer.Option(help="default: the CPU quota")] = None,
) -> None:
    """Warm-start, train and evaluate a prompter, and write a report."""
    _needs_torch("quickstart")
    from alignpro.config import QuickstartConfig, load_yaml

    options = {
        "seed": seed,
        "train.steps": steps,
        "evaluate.num_prompts": prompts,
        "model": model,
        "run_dir": run_dir,
        "threads": threads,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_yaml(QuickstartConfig, None, [*given, *(overrides or [])])
    from rich.console import Console

    from alignpro.quickstart import run_quickstart
    from alignpro.report.tables import arms_table, costs_table, samples_panel, verdict_lines

    console = Console()
    result = run_quickstart(config, console)
    console.print(samples_panel(result.samples))
    console.print(arms_table(result.report))
    console.print(verdict_lines(result.report))
    console.print(costs_table(result.report))
    typer.echo(f"report: {result.run_dir / 'report.html'}")


@app.command()
@one_line_errors
def sft(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Warm-start a prompter on (prompt, instruction) pairs."""
    _needs_torch("sft")
    from alignpro.config import SftConfig, load_yaml

    path, settings = _split(config, overrides)
    options = load_yaml(SftConfig, path, settings)
    from alignpro.report.progress import Bars, show_sft_row
    from alignpro.train.run import run_sft

    with Bars() as bars:
        bars.show("warm start", 0, options.steps)
        run_sft(
            options,
            overwrite=overwrite,
            on_step=lambda row: show_sft_row(bars, row, options.steps),
        )
    typer.echo(f"adapter: {Path(options.run_dir) / 'adapter'}")


@app.command()
@one_line_errors
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, or a run's config.json")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run there")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a prompter by reinforcement learning."""
    _needs_torch("train")
    from alignpro.config import TrainConfig, load_yaml

    options = load_yaml(TrainConfig, config, overrides or [])
    from alignpro.report.progress import Bars, show_train_row
    from alignpro.train.run import make_trainer

    trainer = make_trainer(options, resume=resume, overwrite=overwrite)
    with Bars() as bars:
        bars.show("training", trainer.step, options.steps)
        trainer.train(lambda row: show_train_row(bars, row, options.steps))
    typer.echo(f"adapter: {trainer.run_dir / 'adapter'}")


@app.command()
@one_line_errors
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="write the numbers there, as JSON")] = None,
) -> None:
    """Compare raw prompt, untuned prompter and trained prompter on held-out prompts."""
    from alignpro.config import EvalConfig, load_yaml

    path, settings = _split(config, overrides)
    options = load_yaml(EvalConfig, path, settings)
    if output is not None and output.exists():
        raise FileExistsError(f"{output}: is there already; name another file")
    from rich.console import Console

    from alignpro.evaluate.run import run_evaluation
    from alignpro.report.progress import Bars
    from alignpro.report.tables import arms_table, costs_table, samples_panel, verdict_lines

    with Bars() as bars:
        report = run_evaluation(options, on_progress=bars.show)
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(samples_panel(report["samples"]))
    console.print(arms_table(report))
    console.print(verdict_lines(report))
    console.print(costs_table(report))


@app.command()
@one_line_errors
def generate(
    prompt: Annotated[str, typer.Argument(help='what to answer; "-" reads standard input')],
    model: Annotated[str, typer.Option(help="path or name")] = "smollm2",
    run: Annotated[
        Path | None, typer.Option(help="a training run, whose prompter goes first")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="above 0, at most 1 (off)")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="default: a fresh one")] = None,
    threads: Annotated[int | None, typer.Option(help="default: the CPU quota")] = None,
) -> None:
    """Answer a prompt, as it is or through a trained prompter."""
    from alignpro.config import TrainConfig, load_yaml
    from alignpro.models.native_model import load_model, load_models
    from alignpro.types import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    settings = load_yaml(TrainConfig, run / "config.json") if run is not None else None
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if run is not None and settings is not None:
        from alignpro.models.adapter import load_peft
        from alignpro.pipeline import Pipeline

        prompter, target = load_models(
            settings.model, settings.target, threads, settings.target_compute
        )
        pipeline = Pipeline(
            prompter,
            target,
            None,
            prompting=settings.prompting,
            prompter_adapter=load_peft(run / "adapter", prompter.lora_modules),
            rewrite_params=settings.rewrite,
        )
        rewrite = pipeline.rewrite([text], seed=seed)[0][0]
        typer.echo(f"rewrite: {rewrite.text}", err=True)
        text = rewrite.target_prompt
    else:
        target = load_model(model, threads=threads)
    for _token, delta, _logprob in target.stream(text, params):
        typer.echo(delta, nl=False)
    typer.echo()


@app.command()
@one_line_errors
def info() -> None:
    """Instruction set, threads, backends and versions."""
    import importlib.metadata
    import platform

    from alignpro.native import core

    rows = {"cpu_isa": core.cpu_isa(), "threads": str(core.available_cpus()), **core.build_info()}
    rows["python"] = platform.python_version()
    for package in ("alignpro", "numpy", "tokenizers", "jinja2", "torch", "transformers"):
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    for name, value in rows.items():
        typer.echo(f"{name:<14} {value}")


@bench.command("score")
@one_line_errors
def bench_score(
    model: Annotated[str | None, typer.Option(help="adds its head, and its LoRA pass")] = None,
    json_file: Json = None,
    repeats: Annotated[int, typer.Option(min=1, help="of which the median is taken")] = 5,
    threads: Threads = None,
    peers: Annotated[bool, typer.Option(help="measure torch and what else is installed")] = True,
    shape: Annotated[
        list[str] | None, typer.Option(help="VOCABULARYxHIDDEN of a head; may be repeated")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="in one call; may be repeated")
    ] = None,
) -> None:
    """Log-probabilities, KL and a LoRA pass, as shares of what this machine can do."""
    _needs_torch("bench score")
    _check_new(json_file)
    from rich.console import Console

    from alignpro.bench.score import SHAPES, TOKENS
    from alignpro.bench.score import bench_score as measure
    from alignpro.bench.tables import score_tables
    from alignpro.models.resolve import resolve_model
    from alignpro.native import core

    shapes = [_shape(text) for text in shape] if shape else SHAPES
    with Console(stderr=True).status("") as status:
        report = measure(
            model=None if model is None else resolve_model(model),
            shapes=shapes,
            tokens=tokens or TOKENS,
            threads=threads or core.available_cpus(),
            repeats=repeats,
            peers=peers,
            say=status.update,
        )
    _write_json(json_file, report)
    Console().print(score_tables(report))


@bench.command("step")
@one_line_errors
def bench_step(
    model: BenchModel = "smollm2",
    json_file: Json = None,
    steps: Annotated[int, typer.Option(min=1, help="measured, after one more")] = 5,
    threads: Threads = None,
) -> None:
    """Whole steps of reinforcement learning on work of a fixed size."""
    _needs_torch("bench step")
    _check_new(json_file)
    from alignpro.bench.step import bench_step as measure
    from alignpro.bench.tables import step_table

    _run_bench(measure, step_table, model, json_file, threads, steps=steps)


Compute = Annotated[str, typer.Option(help="float32 or int8")]
KvDtype = Annotated[str, typer.Option(help="of keys and values: float32 or float16")]
Repeats = Annotated[int, typer.Option(min=1, help="of which the median is taken, after one more")]


@bench.command("decode")
@one_line_errors
def bench_decode(
    model: BenchModel = "smollm2",
    batch: Annotated[str, typer.Option(help="sequences at once, separated by commas")] = "1,16,64",
    new_tokens: Annotated[int, typer.Option(min=1, help="a sequence")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="a sequence")] = 37,
    compute: Compute = "float32",
    kv_dtype: KvDtype = "float32",
    json_file: Json = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """Tokens a second by batch, as shares of what this machine can do."""
    from alignpro.bench.generation import bench_decode as measure
    from alignpro.bench.tables import generation_tables

    _run_bench(
        measure,
        generation_tables,
        model,
        json_file,
        threads,
        batches=_counts("--batch", batch),
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        compute=compute,
        kv_dtype=kv_dtype,
        repeats=repeats,
    )


@bench.command("prefill")
@one_line_errors
def bench_prefill(
    model: BenchModel = "smollm2",
    shape: Annotated[str, typer.Option(help="SEQUENCESxTOKENS, separated by commas")] = (
        "1x512,16x128"
    ),
    compute: Compute = "float32",
    kv_dtype: KvDtype = "float32",
    json_file: Json = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """Prompt tokens a second up to the first new token."""
    from alignpro.bench.generation import bench_prefill as measure
    from alignpro.bench.tables import generation_tables

    shapes = [_shape(part, "SEQUENCESxTOKENS, such as 1x512") for part in shape.split(",")]
    _run_bench(
        measure,
        generation_tables,
        model,
        json_file,
        threads,
        shapes=shapes,
        compute=compute,
        kv_dtype=kv_dtype,
        repeats=repeats,
    )


@bench.command("rollout")
@one_line_errors
def bench_rollout(
    model: BenchModel = "smollm2",
    target: Annotated[str | None, typer.Option(help="default: the same model")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="with 4 rewrites each")] = 16,
    json_file: Json = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """prompt -> rewrite -> response, against the same with a barrier between the models."""
    from alignpro.bench.generation import bench_rollout as measure
    from alignpro.bench.tables import generation_tables
    from alignpro.models.resolve import resolve_model

    _run_bench(
        measure,
        generation_tables,
        model,
        json_file,
        threads,
        target=None if target is None else resolve_model(target),
        prompts=prompts,
        repeats=repeats,
    )


@bench.command("growth")
@one_line_errors
def bench_growth(
    model: BenchModel = "smollm2",
    batch: Annotated[str, typer.Option(help="sequences at once")] = "1,2,4,8,16,32,64,128,256",
    context: Annotated[str, typer.Option(help="positions of one sequence")] = (
        "128,256,512,1024,2048,4096,8192"
    ),
    compute: Annotated[str, typer.Option(help="float32, int8 or both")] = "float32",
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="draw it there; needs matplotlib")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="steps, of which the median is taken")] = 9,
    threads: Threads = None,
) -> None:
    """Decoded tokens a second as batch and context grow."""
    from alignpro.bench.growth import bench_growth as measure
    from alignpro.bench.growth import growth_plot
    from alignpro.bench.tables import generation_tables

    _check_new(plot)
    if plot is not None and not _is_installed("matplotlib"):
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or leave it out")
    report = _run_bench(
        measure,
        generation_tables,
        model,
        json_file,
        threads,
        batches=_counts("--batch", batch),
        contexts=_counts("--context", context),
        computes=[part.strip() for part in compute.split(",")],
        repeats=repeats,
    )
    if plot is not None:
        growth_plot(report, plot)


@app.command()
@one_line_errors
def profile(
    model: BenchModel = "smollm2",
    target: Annotated[str | None, typer.Option(help="default: the same model")] = None,
    adapter: Annotated[Path | None, typer.Option(help="of the prompter, a PEFT folder")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="of the everyday set")] = 16,
    rewrites: Annotated[int, typer.Option(min=1, help="a prompt")] = 4,
    compute: Annotated[str, typer.Option(help="of the target: float32 or int8")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    ops: Annotated[bool, typer.Option(help="record every op, not only the steps")] = True,
    out: Annotated[Path, typer.Option(help="the trace, for Perfetto or chrome://tracing")] = Path(
        "profile.json"
    ),
    json_file: Json = None,
    threads: Threads = None,
) -> None:
    """Where the time of a rollout goes: a trace, and tables of stages and ops."""
    _check_new(out)
    if out == json_file:
        raise ValueError(f"--out and --json: expected two files, got {out} twice")
    from alignpro.bench.profile import profile_rollout as measure
    from alignpro.bench.tables import profile_tables
    from alignpro.models.resolve import resolve_model

    _run_bench(
        measure,
        profile_tables,
        model,
        json_file,
        threads,
        target=None if target is None else resolve_model(target),
        adapter=adapter,
        prompts=prompts,
        rewrites=rewrites,
        compute=compute,
        seed=seed,
        ops=ops,
        out=out,
    )


def _run_bench(
    measure: Callable[..., dict[str, Any]],
    tables: Callable[[dict[str, Any]], RenderableType],
    model: str,
    json_file: Path | None,
    threads: int | None,
    **work: Any,
) -> dict[str, Any]:
    """Measure, write the numbers, print them."""
    _check_new(json_file)
    from rich.console import Console

    from alignpro.models.resolve import resolve_model
    from alignpro.native import core

    with Console(stderr=True).status("") as status:
        report = measure(
            model=resolve_model(model),
            threads=threads or core.available_cpus(),
            say=status.update,
            **work,
        )
    _write_json(json_file, report)
    Console().print(tables(report))
    return report


def _shape(text: str, expected: str = "VOCABULARYxHIDDEN, such as 49152x576") -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(_is_count(part) for part in parts):
        raise ValueError(f"--shape: expected {expected}, got {text!r}")
    return int(parts[0]), int(parts[1])


def _counts(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(_is_count(part.strip()) for part in parts):
        raise ValueError(f"{option}: expected numbers such as 1,16,64, got {text!r}")
    return [int(part) for part in parts]


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1


def _check_new(file: Path | None) -> None:
    if file is not None and file.exists():
        raise FileExistsError(f"{file}: is there already; name another file")
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder; make it first")


def _write_json(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _split(config: Path | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """The file is optional, so a first key=value arrives in its place."""
    settings = list(overrides or [])
    if config is not None and "=" in str(config) and not config.exists():
        return None, [str(config), *settings]
    return config, settings


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


def _needs_torch(command: str) -> None:
    if not _is_installed("torch"):
        raise ImportError(
            f"{command} trains, which needs torch: pip install -c constraints.txt '.[train]'"
        )


def main() -> None:
    """The entry point."""
    app()
