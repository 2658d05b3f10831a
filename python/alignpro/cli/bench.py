"""`alignpro bench` and `alignpro profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alignpro.cli.shared import (
    NOT_MET,
    ModelName,
    Output,
    Threads,
    app,
    check_new,
    examples,
    needs_serve,
    needs_torch,
    one_line_errors,
    write_json,
)

bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Target = Annotated[
    str | None, typer.Option(help="The target model; the default is the prompter's.")
]
Compute = Annotated[str, typer.Option(help="Arithmetic of the products: float32 or int8.")]
KvDtype = Annotated[str, typer.Option(help="Type of cached keys and values: float32 or float16.")]
Repeats = Annotated[
    int, typer.Option(min=1, help="Rounds whose median is taken, after one to warm up.")
]


@bench.command("step", epilog=examples("alignpro bench step --steps 3"))
@one_line_errors
def bench_step(
    model: ModelName = "smollm2",
    output: Output = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps that are measured, after one to warm up.")
    ] = 5,
    threads: Threads = None,
) -> None:
    """Seconds of whole training steps on work of a fixed size, by stage."""
    needs_torch("bench step")
    from alignpro.bench.step import bench_step as measure

    _run_bench(measure, model, output, threads, {"steps": steps})


@bench.command("decode", epilog=examples("alignpro bench decode --batch 1,16 --output decode.json"))
@one_line_errors
def bench_decode(
    model: ModelName = "smollm2",
    batch: Annotated[
        str, typer.Option(help="Numbers of sequences at once, separated by commas.")
    ] = "1,16,64",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a sequence writes.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence's prompt.")] = 37,
    compute: Compute = "float32",
    kv_dtype: KvDtype = "float32",
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Below 1: also the rate of such draws.")
    ] = 1.0,
    output: Output = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """Decoded tokens a second by batch, as shares of what this machine can do."""
    from alignpro.bench.generation import bench_decode as measure

    work: dict[str, Any] = {"compute": compute, "kv_dtype": kv_dtype, "repeats": repeats}
    work["batches"] = _counts("--batch", batch, ",", "numbers such as 1,16,64")
    work |= {"new_tokens": new_tokens, "prompt_tokens": prompt_tokens, "top_p": top_p}
    _run_bench(measure, model, output, threads, work)


@bench.command("prefill", epilog=examples("alignpro bench prefill --shape 1x512,16x128"))
@one_line_errors
def bench_prefill(
    model: ModelName = "smollm2",
    shape: Annotated[
        str, typer.Option(help="SEQUENCESxTOKENS of the prompts, separated by commas.")
    ] = "1x512,16x128",
    compute: Compute = "float32",
    kv_dtype: KvDtype = "float32",
    output: Output = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """Prompt tokens a second up to the first new token, as shares of this machine's limits."""
    from alignpro.bench.generation import bench_prefill as measure

    shapes = [
        _counts("--shape", part.lower(), "x", "SEQUENCESxTOKENS, such as 1x512", count=2)
        for part in shape.split(",")
    ]
    work = {"shapes": shapes, "compute": compute, "kv_dtype": kv_dtype, "repeats": repeats}
    _run_bench(measure, model, output, threads, work)


@bench.command("rollout", epilog=examples("alignpro bench rollout --prompts 8"))
@one_line_errors
def bench_rollout(
    model: ModelName = "smollm2",
    target: Target = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, with 4 rewrites each.")] = 16,
    output: Output = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """Tokens a second of whole rollouts: prompt -> rewrite -> response."""
    from alignpro.bench.generation import bench_rollout as measure

    work = {"target": target, "prompts": prompts, "repeats": repeats}
    _run_bench(measure, model, output, threads, work)


@bench.command("lookup", epilog=examples("alignpro bench lookup --compute int8"))
@one_line_errors
def bench_lookup(
    model: ModelName = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each kind.")] = 24,
    compute: Compute = "float32",
    kv_dtype: KvDtype = "float32",
    output: Output = None,
    threads: Threads = None,
) -> None:
    """Time of single rewrites with tokens looked up in the text before, and without."""
    from alignpro.bench.lookup import bench_lookup as measure

    work = {"requests": requests, "compute": compute, "kv_dtype": kv_dtype}
    _run_bench(measure, model, output, threads, work)


@bench.command(
    "serve", epilog=examples("alignpro bench serve", "alignpro bench serve --run alignpro-run")
)
@one_line_errors
def bench_serve(
    run: Annotated[
        Path | None, typer.Option(help="Run whose prompter rewrites; none measures no rewrites.")
    ] = None,
    clients: Annotated[
        str, typer.Option(help="Numbers of clients at once, separated by commas.")
    ] = "1,32",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds of a round of what is not rewritten.")
    ] = 2.0,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Requests a second; the default is a quarter of what the proxy takes from as "
            "many clients.",
        ),
    ] = None,
    rewrites: Annotated[
        int, typer.Option(min=1, help="Requests of a round, which the run rewrites.")
    ] = 64,
    output: Output = None,
    repeats: Repeats = 5,
    threads: Threads = None,
) -> None:
    """What `alignpro serve` adds to a request's time, and how many requests a run rewrites."""
    needs_serve("bench serve")
    from alignpro.bench.serve import bench_serve as measure

    work: dict[str, Any] = {"run": run, "rate": rate, "seconds": seconds, "rewrites": rewrites}
    work |= {"clients": _counts("--clients", clients, ",", "numbers such as 1,32")}
    _run_bench(measure, None, output, threads, work | {"repeats": repeats})


@bench.command("soak", epilog=examples("alignpro bench soak --minutes 10 --run alignpro-run"))
@one_line_errors
def bench_soak(
    run: Annotated[
        Path | None, typer.Option(help="Run whose prompter rewrites, and is read again meanwhile.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of load.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of what the clients ask.")] = 0,
    output: Output = None,
    threads: Threads = None,
) -> None:
    """Whether `alignpro serve` loses a request, or memory, under clients that leave and an upstream
    that fails.

    Exit status 3 says that it does.
    """
    needs_serve("bench soak")
    from alignpro.bench.soak import bench_soak as measure

    work = {"run": run, "clients": clients, "seconds": 60 * minutes, "seed": seed}
    if not _run_bench(measure, None, output, threads, work)["holds"]:
        raise typer.Exit(NOT_MET)


@app.command(
    epilog=examples(
        "alignpro profile --prompts 4",
        "alignpro profile --trace profile.json --output profile-numbers.json",
        "alignpro profile --request --run alignpro-run",
    )
)
@one_line_errors
def profile(
    model: ModelName = "smollm2",
    request: Annotated[
        bool, typer.Option("--request", help="Profile requests to `alignpro serve`, not a rollout.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(help="With --request: the run whose prompter rewrites, not --model."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --request: the user turn of every request.")
    ] = None,
    target: Target = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT folder of the prompter's adapter.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the everyday set.")] = 16,
    rewrites: Annotated[int, typer.Option(min=1, help="Rewrites of each prompt.")] = 4,
    compute: Annotated[
        str, typer.Option(help="Arithmetic of the target's products: float32 or int8.")
    ] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the rollout.")] = 0,
    ops: Annotated[bool, typer.Option(help="Record every op, not only the steps.")] = True,
    trace: Annotated[
        Path, typer.Option(help="File of the trace, for Perfetto or chrome://tracing.")
    ] = Path("profile.json"),
    output: Output = None,
    threads: Threads = None,
) -> None:
    """Say where the time of a rollout, or of a request, goes.

    A trace, and tables of stages and ops, or of a request's phases.
    """
    check_new(trace)
    if trace == output:
        raise ValueError(f"--trace and --output: expected two files, got {trace} twice")
    work: dict[str, Any] = {"adapter": adapter, "prompts": prompts, "rewrites": rewrites}
    work |= {"ops": ops, "out": trace}
    of_rollout = {"target": target, "compute": compute, "seed": seed}
    if request:
        _only(
            "without --request", target=(target, None), compute=(compute, "float32"), seed=(seed, 0)
        )
        if run is not None:
            own = "without --run, which has its own"
            _only(own, model=(model, "smollm2"), adapter=(adapter, None))
        if prompt is not None:
            _only("without --prompt", prompts=(prompts, 16))
        needs_serve("profile --request")
        from alignpro.bench.request import profile_request

        work |= {"run": run, "prompt": prompt}
        _run_bench(profile_request, model if run is None else None, output, threads, work)
    else:
        _only("with --request", run=(run, None), prompt=(prompt, None))
        from alignpro.bench.profile import profile_rollout

        _run_bench(profile_rollout, model, output, threads, work | of_rollout)


def _only(when: str, **options: tuple[Any, Any]) -> None:
    """Refuse an option that means nothing here: one whose value is not its default."""
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(f"--{name}: expected only {when}, got {value}")


def _run_bench(
    measure: Callable[..., dict[str, Any]],
    model: str | None,
    output: Path | None,
    threads: int | None,
    work: dict[str, Any],
) -> dict[str, Any]:
    """model: None is a measurement that is not of one."""
    check_new(output)
    from alignpro.config import ModelConfig

    if model is not None:  # refused before anything is looked for
        ModelConfig(model, **{k: v for k, v in work.items() if k in ("compute", "kv_dtype")})
    from rich.console import Console

    from alignpro.bench.tables import bench_tables
    from alignpro.models.resolve import resolve_model
    from alignpro.native import core
    from alignpro.report.progress import Bars

    with Bars("beginning" if model is None else "finding the model") as bars:
        if work.get("target") is not None:
            work["target"] = resolve_model(work["target"])
        if model is not None:
            work["model"] = resolve_model(model)
        report = measure(say=bars.doing, threads=threads or core.available_cpus(), **work)
    write_json(output, report)
    Console().print(bench_tables(report))
    return report


def _counts(
    option: str, text: str, separator: str, expected: str, count: int | None = None
) -> list[int]:
    parts = [part.strip() for part in text.split(separator)]
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) != (
        count or len(parts)
    ):
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    return [int(part) for part in parts]
