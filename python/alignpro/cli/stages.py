"""Train, evaluate and use a prompter."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignpro.cli.shared import (
    NOT_MET,
    AllowChanges,
    Config,
    DryRun,
    ModelName,
    Output,
    Overrides,
    Overwrite,
    Resume,
    Run,
    Threads,
    app,
    check_inputs,
    check_new,
    examples,
    needs_torch,
    one_line_errors,
    read_settings,
    say_memory,
    training_settings,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from alignpro.config import EvalConfig
    from alignpro.evaluate.results import Evaluation


@app.command(
    epilog=examples("alignpro quickstart", "alignpro quickstart --seed 1 --steps 48 --run seed-1")
)
@one_line_errors
def quickstart(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of the configuration; without one, the shipped house rules."
        ),
    ] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the run.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training.")] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Number of held-out prompts to evaluate on.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Path or name of the model.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Directory of the run; a number is added where it is taken.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Warm-start, train and evaluate a prompter, with a report."""
    needs_torch("quickstart")
    from alignpro.config import QUICKSTART, QuickstartConfig

    options = {
        "seed": seed,
        "train.steps": steps,
        "evaluate.num_prompts": prompts,
        "prompter.model": model,
        "run_dir": run,
        "threads": threads,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    settings = read_settings(
        QuickstartConfig, config, [*(overrides or []), *given], default=QUICKSTART
    )
    check_inputs(settings)
    from rich.console import Console

    from alignpro.report.progress import Bars
    from alignpro.report.tables import report_view

    with Bars("loading torch"):
        from alignpro.quickstart import run_quickstart
    result = run_quickstart(settings)
    Console().print(report_view(result.report, result.metrics))
    typer.echo(f"report: {result.run_dir / 'report.html'}")
    _exit_unless_met(result.report.evaluation)


@app.command(
    epilog=examples(
        "alignpro sft run_dir=alignpro-sft", "alignpro sft data=pairs.jsonl steps=64 seed=1"
    )
)
@one_line_errors
def sft(
    config: Config = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = False,
    dry_run: DryRun = False,
) -> None:
    """Warm-start a prompter on (prompt, instruction) pairs."""
    from alignpro.config import SftConfig

    options = training_settings(
        SftConfig, config, overrides, resume=resume, overwrite=overwrite, dry_run=dry_run
    )
    if dry_run:
        return say_memory(options)
    from alignpro.report.progress import Bars, show_sft_row

    with Bars("loading data and model") as bars:
        from alignpro.train.run import run_sft

        run_sft(
            options,
            resume=resume,
            overwrite=overwrite,
            allow_changes=allow_changes,
            on_step=lambda row: show_sft_row(bars, row, options.steps),
        )
    typer.echo(f"adapter: {Path(options.run_dir) / 'adapter'}")


@app.command(
    epilog=examples(
        "alignpro train alignpro.yaml",
        "alignpro train alignpro.yaml steps=40 kl_coef=0.1 run_dir=second",
        "alignpro train alignpro.yaml --dry-run",
        "alignpro train alignpro-run/config.json --resume",
    )
)
@one_line_errors
def train(
    config: Config = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would cost, and stop.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Price a dry run on this card, such as H200, H100 or A100.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="JSON file of measured shares to price a dry run with.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt to price a dry run with.")
    ] = None,
    output: Output = None,
) -> None:
    """Train a prompter by reinforcement learning."""
    from alignpro.config import TrainConfig

    given = {"--gpu": gpu, "--rates": rates, "--prompt-tokens": prompt_tokens, "--output": output}
    if dry_run:
        needs_torch("train")
        options = read_settings(TrainConfig, config, overrides)
        check_new(output)
        check_inputs(options, resume=True)
        if options.algorithm == "closed_form":
            _refuse(given, "goes with the price of an algorithm that samples while it trains")
            return say_memory(options)
        from alignpro.report.progress import Bars

        with Bars("loading torch") as bars:
            from rich.console import Console

            from alignpro.price.estimate import price_train
            from alignpro.price.tables import price_tables

            bars.doing("measuring this machine" if gpu is None else "counting")
            report = price_train(options, gpu_name=gpu, rates=rates, prompt_tokens=prompt_tokens)
        write_json(output, report)
        Console().print(price_tables(report))
        return
    _refuse(given, "says how --dry-run prices a run; add --dry-run")
    options = training_settings(TrainConfig, config, overrides, resume=resume, overwrite=overwrite)
    from alignpro.report.progress import Bars, TrainBar

    with Bars("loading data and models") as bars:
        from alignpro.models.endpoint import EndpointModel
        from alignpro.train.run import run_train

        trainer = run_train(
            options,
            resume=resume,
            overwrite=overwrite,
            allow_changes=allow_changes,
            callbacks=[TrainBar(bars)],
            on_progress=bars.show,
        )
    if isinstance(trainer.pipeline.target, EndpointModel):
        typer.echo(trainer.pipeline.target.spent())
    typer.echo(f"adapter: {trainer.run_dir / 'adapter'}")


@app.command(
    epilog=examples(
        "alignpro evaluate trained=alignpro-run/adapter reward=topic --output evaluation.json",
        "alignpro evaluate trained=alignpro-run/adapter static={} --require 'trained>static'",
    )
)
@one_line_errors
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    run: Run = None,
    output: Output = None,
    required: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="ARM>ARM[+MARGIN]",
            help="End with exit status 3 unless the paired 95% interval of the difference between "
            "the two arms lies above the margin (0 if none is given); may be given again.",
        ),
    ] = None,
) -> None:
    """Compare the arms on held-out prompts.

    They are the raw prompt, the untuned and the trained prompter, and what the configuration adds
    (static, policy_text, labelled, optimum, soft, tuned, judge). Adapters of the target alone are
    compared without a prompter.
    """
    from alignpro.config import EvalConfig

    beside = None
    if run is not None:
        from alignpro.evaluate.of_run import EVALUATE

        beside = run / EVALUATE if (run / EVALUATE).is_file() else None
    options = read_settings(EvalConfig, config, overrides, default=beside, run=run)
    options = replace(options, require=(*options.require, *(required or [])))
    output = run / "evaluation.json" if output is None and run is not None else output
    report = _evaluated(options, run, output)
    from rich.console import Console

    from alignpro.evaluate.results import Report
    from alignpro.report.tables import report_view

    Console().print(report_view(Report(report)))
    _exit_unless_met(report)


@app.command(
    epilog=examples(
        "alignpro safety data=surprise data.split=heldout --run alignpro-run",
        "alignpro safety data=prompts.csv trained=alignpro-run/adapter safety.harm=mine:harm",
    )
)
@one_line_errors
def safety(
    config: Config = None,
    overrides: Overrides = None,
    run: Run = None,
    output: Output = None,
) -> None:
    """Count harmful answers to marked prompts, arm by arm.

    Beside them: refusals and reward on the other prompts. The configuration is evaluate's, with its
    group safety.
    """
    from alignpro.config import EvalConfig, SafetyConfig

    options = read_settings(EvalConfig, config, overrides, run=run)
    options = replace(options, safety=options.safety or SafetyConfig())
    output = run / "safety.json" if output is None and run is not None else output
    report = _evaluated(options, run, output)
    assert report.safety is not None
    from rich.console import Console

    from alignpro.report.tables import safety_tables

    Console().print(safety_tables(report.safety))
    _exit_unless_met(report)


def _evaluated(options: EvalConfig, run: Path | None, output: Path | None) -> Evaluation:
    """The evaluation, written; what was there before a judge failed is kept."""
    check_inputs(options)
    from alignpro.evaluate.run import UnjudgedError, run_evaluate
    from alignpro.report.progress import Bars

    with writing(run, output):
        try:
            with Bars("loading data and models") as bars:
                report = run_evaluate(options, output=output, run=run, on_progress=bars.show)
        except UnjudgedError as error:
            if output is None:
                raise
            kept = output.with_name(output.name + ".unjudged.json")
            write_json(kept, error.report)
            raise UnjudgedError(f"{error}; the arms without it: {kept}", error.report) from None
        write_json(output, report)
    return report


def _exit_unless_met(evaluation: Evaluation | None) -> None:
    required = None if evaluation is None else evaluation.required
    if not all(one.met for one in required or ()):
        raise typer.Exit(NOT_MET)


@app.command(
    epilog=examples(
        "alignpro generate 'Why is the sky blue?'",
        "alignpro generate 'Why is the sky blue?' --run alignpro-run --seed 1",
        "alignpro generate - --model smollm2 --max-new-tokens 64 < question.txt",
    )
)
@one_line_errors
def generate(
    prompt: Annotated[
        str, typer.Argument(help='Text to answer; "-" reads it from standard input.')
    ],
    model: ModelName = "smollm2",
    run: Annotated[
        Path | None,
        typer.Option(help="A training run whose prompter, or tuned target, takes part."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this mass; 1 is all of them.")
    ] = 1.0,
    rewrite_temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature of the rewrite; the default is the run's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; the default is a fresh one.")
    ] = None,
    threads: Threads = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Chat template: a name among the model's own, a file, or its text."),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Variables of the template, such as '{enable_thinking: false}'."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device to run on: cpu, or cuda in a build with CUDA.")
    ] = "cpu",
    deterministic: Annotated[
        bool,
        typer.Option(
            help="Whether log-probabilities are equal to the bit in sampling and scoring; on cuda "
            "it can be turned off for speed."
        ),
    ] = True,
) -> None:
    """Answer a prompt, as it is or through a trained prompter."""
    from alignpro.config import ModelConfig, SftConfig, from_mapping, target_of
    from alignpro.models.arguments import core_params, with_seed
    from alignpro.models.endpoint import EndpointModel
    from alignpro.models.native_model import NativeModel, load_model, load_models
    from alignpro.models.reading import naming
    from alignpro.report.progress import Bars
    from alignpro.run_directory import config_of_run
    from alignpro.types import Conversation, SamplingParams

    def placed(config: ModelConfig) -> ModelConfig:
        if config.endpoint is not None:
            return config
        here: dict[str, Any] = {"device": device, "deterministic": deterministic}
        if config.device != device:
            here |= {"compute": None, "kv_dtype": None}  # this device's own
        return from_mapping(ModelConfig, here, base=config)

    text = sys.stdin.read() if prompt == "-" else prompt
    chats = [] if chat_template is None else [f"chat_template={json.dumps(chat_template)}"]
    if chat_template_kwargs is not None:
        chats.append(f"chat_template_kwargs={chat_template_kwargs}")
    if run is not None and chats:
        raise ValueError(f"{chats[0]}: expected no chat template with --run, which has its own")
    sampling = None if rewrite_temperature is None else {"temperature": rewrite_temperature}
    if run is None and sampling is not None:
        raise ValueError("--rewrite-temperature: expected --run, whose prompter rewrites")
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with naming("prompt"):
        Conversation.of(text)
    core_params(with_seed(params), sample=0)  # refused before a model is loaded
    target: NativeModel | EndpointModel
    with Bars("loading"):
        if run is None:
            named = read_settings(ModelConfig, None, [f"model={json.dumps(model)}", *chats])
            target, adapter = load_model(placed(named), threads), None
        else:
            settings = config_of_run(run)
            named_target = None if isinstance(settings, SftConfig) else settings.target
            answers = placed(target_of(settings.prompter, named_target))
            if not isinstance(settings, SftConfig) and settings.policy == "target":
                if sampling is not None:
                    raise ValueError(f"--rewrite-temperature: {run} has no prompter")
                target = load_model(answers, threads, date=settings.date)
                adapter = str(run / "adapter")
            else:
                from alignpro.prompter import Prompter

                prompter, target = load_models(
                    placed(settings.prompter), answers, threads, date=settings.date
                )
                adapter = answers.adapter
                rewriting = Prompter.from_run(run, model=prompter, sampling=sampling)
                rewrite = rewriting.rewrites([text], seed=seed)[0][0]
                typer.echo(f"rewrite: {rewrite.text}", err=True)
                text = Conversation.of(rewrite.target_prompt).last_turn
    if isinstance(target, EndpointModel):
        client = target.client()
        handle = client.submit([{"role": "user", "content": text}], params)
        client.step()
        typer.echo(handle.completion().text)
        return
    written = ""
    for _token, delta, _logprob in target.stream(text, params, adapter=adapter):
        written += delta
        typer.echo(delta, nl=False)
    typer.echo()
    if not written:
        typer.echo("no answer was begun; --max-new-tokens allows a longer one", err=True)


@app.command(epilog=examples("alignpro info"))
@one_line_errors
def info() -> None:
    """Print instruction set, threads, backends and versions."""
    from alignpro.bench.machine import versions
    from alignpro.native import core

    rows = {"cpu_isa": core.cpu_isa(), "threads": str(core.available_cpus()), **core.build_info()}
    packages = ("alignpro", "numpy", "tokenizers", "jinja2", "torch", "transformers")
    found = versions(packages)
    rows |= {name: found.get(name, "not installed") for name in ("python", *packages)}
    for name, value in rows.items():
        typer.echo(f"{name:<14} {value}")


def _refuse(options: Mapping[str, object], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: {reason}")
