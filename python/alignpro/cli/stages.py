"""Train, evaluate and use a prompter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignpro.cli.shared import (
    Config,
    Json,
    Overrides,
    Overwrite,
    app,
    check_new,
    needs_torch,
    one_line_errors,
    split_settings,
    write_json,
)

if TYPE_CHECKING:
    from alignpro.config import TrainConfig


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
    needs_torch("quickstart")
    from alignpro.config import QuickstartConfig, load_yaml

    options = {
        "seed": seed,
        "train.steps": steps,
        "evaluate.num_prompts": prompts,
        "prompter.model": model,
        "run_dir": run_dir,
        "threads": threads,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_yaml(QuickstartConfig, None, [*given, *(overrides or [])])
    from rich.console import Console

    from alignpro.quickstart import run_quickstart
    from alignpro.report.view import report_view

    console = Console()
    result = run_quickstart(config, console)
    console.print(report_view(result.report, result.metrics))
    typer.echo(f"report: {result.run_dir / 'report.html'}")


@app.command()
@one_line_errors
def sft(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Warm-start a prompter on (prompt, instruction) pairs."""
    needs_torch("sft")
    from alignpro.config import SftConfig, load_yaml

    path, settings = split_settings(config, overrides)
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what it would cost")] = False,
    gpu: Annotated[str | None, typer.Option(help="dry run: on H200, H100, A100, ...")] = None,
    rates: Annotated[Path | None, typer.Option(help="dry run: measured shares, JSON")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="dry run: a prompt's")] = None,
    json_file: Json = None,
) -> None:
    """Train a prompter by reinforcement learning."""
    needs_torch("train")
    from alignpro.config import TrainConfig, load_yaml

    options = load_yaml(TrainConfig, config, overrides or [])
    if dry_run:
        _price(options, gpu, rates, prompt_tokens, json_file)
        return
    given = {"--gpu": gpu, "--rates": rates, "--prompt-tokens": prompt_tokens, "--json": json_file}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: says how --dry-run prices a run; add --dry-run")
    from alignpro.report.progress import Bars, TrainBar
    from alignpro.train.closed_form import ClosedFormFit
    from alignpro.train.run import make_trainer

    trainer = make_trainer(options, resume=resume, overwrite=overwrite)
    with Bars() as bars:
        if isinstance(trainer, ClosedFormFit):
            trainer.rollouts(bars.show)
        trainer.train([TrainBar(bars)])
    typer.echo(f"adapter: {trainer.run_dir / 'adapter'}")


def _price(
    options: TrainConfig,
    gpu: str | None,
    rates: Path | None,
    prompt_tokens: int | None,
    json_file: Path | None,
) -> None:
    check_new(json_file)
    from rich.console import Console

    from alignpro.price.devices import read_rates
    from alignpro.price.estimate import price_train
    from alignpro.price.tables import price_tables

    report = price_train(
        options,
        gpu_name=gpu,
        rates=None if rates is None else read_rates(rates),
        prompt_tokens=prompt_tokens,
    )
    write_json(json_file, report)
    Console().print(price_tables(report))


@app.command()
@one_line_errors
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="write the numbers there, as JSON")] = None,
) -> None:
    """Compare the arms on held-out prompts: raw prompt, untuned and trained prompter, and what the
    configuration adds (static, optimum, tuned, judge)."""
    from alignpro.config import EvalConfig, load_yaml

    path, settings = split_settings(config, overrides)
    options = load_yaml(EvalConfig, path, settings)
    check_new(output)
    from rich.console import Console

    from alignpro.evaluate.run import UnjudgedError, run_evaluation
    from alignpro.report.progress import Bars
    from alignpro.report.view import report_view

    try:
        with Bars() as bars:
            report = run_evaluation(options, output=output, on_progress=bars.show)
    except UnjudgedError as error:
        if output is None:
            raise
        kept = output.with_name(output.name + ".unjudged.json")
        write_json(kept, error.report)
        raise UnjudgedError(f"{error}; the arms without it: {kept}", error.report) from None
    write_json(output, report)
    Console().print(report_view(report))


@app.command()
@one_line_errors
def generate(
    prompt: Annotated[str, typer.Argument(help='what to answer; "-" reads standard input')],
    model: Annotated[str, typer.Option(help="path or name")] = "smollm2",
    run: Annotated[
        Path | None,
        typer.Option(help="a training run, whose prompter (or tuned target) takes part"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="above 0, at most 1 (off)")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="default: a fresh one")] = None,
    threads: Annotated[int | None, typer.Option(help="default: the CPU quota")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda in a build that has it.")] = "cpu",
    deterministic: Annotated[
        bool, typer.Option(help="Sample bit for bit what scoring would give; off, on cuda: faster.")
    ] = True,
) -> None:
    """Answer a prompt, as it is or through a trained prompter."""
    from alignpro.config import ModelConfig, TrainConfig, from_mapping, load_yaml, target_of
    from alignpro.models.native_model import load_model, load_models
    from alignpro.types import SamplingParams

    def placed(config: ModelConfig) -> ModelConfig:
        here: dict[str, Any] = {"device": device, "deterministic": deterministic}
        if config.device != device:
            here |= {"compute": None, "kv_dtype": None}  # this device's own
        return from_mapping(ModelConfig, here, base=config)

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if run is None:
        target, adapter = load_model(placed(ModelConfig(model)), threads), None
    else:
        settings = load_yaml(TrainConfig, run / "config.json")
        answers = placed(target_of(settings.prompter, settings.target))
        if settings.policy == "target":
            target, adapter = load_model(answers, threads), str(run / "adapter")
        else:
            from alignpro.pipeline import Pipeline

            prompter, target = load_models(placed(settings.prompter), answers, threads)
            adapter = answers.adapter
            pipeline = Pipeline.configured(settings, prompter, target, None)
            rewriting = pipeline.with_adapter(prompter.make_adapter(run / "adapter"))
            rewrite = rewriting.rewrite([text], seed=seed)[0][0]
            typer.echo(f"rewrite: {rewrite.text}", err=True)
            text = rewrite.target_prompt
    for _token, delta, _logprob in target.stream(text, params, adapter=adapter):
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
