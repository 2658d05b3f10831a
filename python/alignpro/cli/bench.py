"""`alignpro bench` and `alignpro profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignpro.cli.shared import (
    Json,
    ModelName,
    Threads,
    app,
    check_new,
    is_installed,
    needs_torch,
    one_line_errors,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

bench = typer.Typer(help="Measure this machine, this package and its peers.", no_args_is_help=True)
app.add_typer(bench, name="bench")


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
    needs_torch("bench score")
    check_new(json_file)
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
    write_json(json_file, report)
    Console().print(score_tables(report))


@bench.command("step")
@one_line_errors
def bench_step(
    model: ModelName = "smollm2",
    json_file: Json = None,
    steps: Annotated[int, typer.Option(min=1, help="measured, after one more")] = 5,
    threads: Threads = None,
) -> None:
    """Whole steps of reinforcement learning on work of a fixed size."""
    needs_torch("bench step")
    check_new(json_file)
    from alignpro.bench.step import bench_step as measure
    from alignpro.bench.tables import step_table

    _run_bench(measure, step_table, model, json_file, threads, steps=steps)


Compute = Annotated[str, typer.Option(help="float32 or int8")]
KvDtype = Annotated[str, typer.Option(help="of keys and values: float32 or float16")]
Repeats = Annotated[int, typer.Option(min=1, help="of which the median is taken, after one more")]


@bench.command("decode")
@one_line_errors
def bench_decode(
    model: ModelName = "smollm2",
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
    model: ModelName = "smollm2",
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
    model: ModelName = "smollm2",
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
    model: ModelName = "smollm2",
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

    check_new(plot)
    if plot is not None and not is_installed("matplotlib"):
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
    model: ModelName = "smollm2",
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
    check_new(out)
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
    check_new(json_file)
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
    write_json(json_file, report)
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
