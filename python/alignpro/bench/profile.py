"""`alignpro profile`: where the time of one rollout goes, by stage and by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alignpro import trace
from alignpro.bench.generation import Say, rollout_pipeline, rollout_prompts
from alignpro.bench.machine import limits, machine, peak_rss_bytes, recorded
from alignpro.bench.timeline import Timeline, beyond
from alignpro.bench.work import ROLLOUT
from alignpro.config import ModelConfig, from_mapping
from alignpro.models.native_model import NativeModel, load_models
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import REWRITE_STREAM, Pipeline
from alignpro.rewards.build import build_reward
from alignpro.types import Prompt, Rollout

_LIMIT_REPEATS = 5
Result = TypeVar("Result")


def profile_rollout(
    *,
    model: Path,
    target: Path | None = None,
    adapter: Path | None = None,
    prompts: int = ROLLOUT.prompts,
    rewrites: int = ROLLOUT.rewrites,
    compute: str = "float32",
    seed: int = 0,
    ops: bool = True,
    out: Path,
    threads: int,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Record one rollout of everyday prompts on freshly loaded models; write its trace to ``out``.

    Stages are those of `Timeline`, which says how a step with rows of both models is divided.
    An op's time is what its caller waited for, with all threads at work. Its operations and bytes
    are counted from its sizes: a multiply-add is two operations, weights count as they are
    stored, each operand once. Shares are of the limits measured just before, and once more after it
    where an op was faster: then of the larger ones.

    Args:
        target: None is the prompter's model. adapter: a PEFT folder for the prompter.
        compute: the target's arithmetic; the prompter, which would be trained, runs in float32.
        ops: record every op as well; without it ``ops`` of the result is None.
    """
    texts = rollout_prompts(prompts)
    say("loading")
    prompter, answerer = load_models(
        ModelConfig(str(model)),
        from_mapping(ModelConfig, {"model": target, "compute": compute}),
        threads,
    )
    assert isinstance(answerer, NativeModel)
    reward, no_reward = None, None
    try:
        reward = build_reward("vader")
    except ImportError as error:
        no_reward = str(error)
    pipeline = rollout_pipeline(prompter, answerer, reward, prompter.prepare(adapter))
    say("measuring the machine's limits")
    measured = limits(threads, _LIMIT_REPEATS)
    say("rollout")
    rollout, events, spans = record(pipeline, texts, rewrites, seed, ops)
    memory = peak_rss_bytes()
    timeline = Timeline(events, spans, rewrite_seeds(seed, prompts))
    found = timeline.ops(measured) if ops else None
    if any(beyond(op) for op in found or ()):
        # Other work held the machine back when its limits were measured, and not in the rollout.
        say("measuring the machine's limits again")
        again = limits(threads, _LIMIT_REPEATS)
        measured = {name: max(value, again[name]) for name, value in measured.items()}
        found = timeline.ops(measured)
    say("writing")
    report = {
        "benchmark": "profile",
        "machine": machine(threads),
        "limits": measured,
        "repeats": _LIMIT_REPEATS,
        "model": prompter.name,
        "target": answerer.name,
        "one_engine": prompter is answerer,
        "adapter": None if adapter is None else str(adapter),
        "compute": answerer.config["compute"],
        "prompts": prompts,
        "rewrites": rewrites,
        "seed": seed,
        "no_reward": no_reward,
        "seconds": timeline.seconds,
        "generated_tokens": rollout.generated_tokens,
        "tokens_per_second": rollout.generated_tokens / timeline.seconds,
        "steps": timeline.steps,
        "rows_per_step": float(timeline.rows.sum()) / max(timeline.steps, 1),
        "stages": timeline.stages(),
        "ops": found,
        "dropped": events["dropped"],
        "trace": str(out),
        "peak_rss_bytes": memory,
    }
    about = {name: value for name, value in report.items() if name not in ("stages", "ops")}
    timeline.write_chrome_trace(out, about)
    return report


def record(
    pipeline: Pipeline, prompts: list[Prompt], rewrites: int, seed: int, ops: bool
) -> tuple[Rollout, Mapping[str, Any], list[trace.Span]]:
    return record_work(lambda: pipeline.rollout(prompts, num_rewrites=rewrites, seed=seed), ops=ops)


def record_work(
    work: Callable[[], Result], *, ops: bool
) -> tuple[Result, Mapping[str, Any], list[trace.Span]]:
    """What it returns, and what the engine and Python recorded meanwhile."""
    trace.start()
    try:
        result, events = recorded(work, "ops" if ops else "steps")
    finally:
        spans = trace.stop()
    return result, events, spans


def rewrite_seeds(seed: int, prompts: int) -> list[int]:
    return [derive_seed(seed, REWRITE_STREAM, index) for index in range(prompts)]
