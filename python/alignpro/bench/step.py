"""`alignpro bench step`: whole steps of the trainer on work whose lengths are forced."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignpro.bench.generation import Say, open_report
from alignpro.bench.machine import peak_rss_bytes, recorded
from alignpro.bench.timeline import engine_flops
from alignpro.bench.work import WORK, StepWork
from alignpro.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from alignpro.data.load import load_prompts, stack_columns
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.train.callbacks import TrainCallback
from alignpro.train.policy import LoraPolicy
from alignpro.train.trainer import Trainer
from alignpro.types import SamplingParams

WARM_UP = 1  # steps that are run and not counted
_LIMIT_REPEATS = 5


class _Clock(TrainCallback):
    """Takes the wall time of every step, from the end of the one before it."""

    def __init__(self, rows: list[dict[str, Any]], say: Say) -> None:
        self._rows, self._say = rows, say

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self._steps = config["steps"]
        self._say(f"step 1 of {self._steps}")
        self._last = time.perf_counter()

    def on_step(self, row: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        wall = now - self._last
        self._rows.append({**row, "wall": wall, "end_ns": time.perf_counter_ns()})
        self._say(f"step {len(self._rows)} of {self._steps}: {wall:.1f} s")
        self._last = time.perf_counter()


def bench_step(
    *,
    model: Path,
    steps: int = 5,
    threads: int,
    work: StepWork = WORK,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Medians over ``steps`` steps after a first one, as plain values.

    A step is timed from the end of the one before it to its own end: sampling, responses, reward,
    scores and gradients under the KL, the optimizer, and the log. ``generate_fma_share`` is of the
    machine's multiply-adds, by the engine's own counts.
    """
    config = forced_lengths(
        TrainConfig(
            prompter=ModelConfig(str(model)),
            steps=WARM_UP + steps,
            prompts_per_step=work.prompts,
            num_rewrites=work.rewrites,
            num_responses=1,
            rewrite=SamplingParams(max_new_tokens=work.rewrite_tokens),
            response=SamplingParams(
                max_new_tokens=work.response_tokens, temperature=work.response_temperature
            ),
            data=DataConfig(work.data, split=work.split),
            kl_coef=work.kl_coef,
            learning_rate=work.learning_rate,
            lora=LoraConfig(rank=work.lora_rank, alpha=work.lora_alpha),
            checkpoint_every=WARM_UP + steps + 1,
            threads=threads,
        )
    )
    say(f"measuring the machine's limits, and loading {model.name}")
    native, report = open_report("step", model, threads, _LIMIT_REPEATS, prefix_cache=True)
    prompts = load_prompts(config.data)
    pipeline = Pipeline.configured(config, native, native, build_reward(config.reward))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config,
            pipeline,
            LoraPolicy.fresh(native, config.lora, seed=config.seed),
            [row.prompt for row in prompts],
            columns=stack_columns(prompts),
            run_dir=Path(folder) / "run",
        )
        _, events = recorded(lambda: trainer.train([_Clock(rows, say)]))
        peak = peak_rss_bytes()
    for row in rows:
        if row["generated_tokens"] != work.generated_tokens:
            raise RuntimeError(
                f"step {row['step']}: expected {work.generated_tokens} tokens of forced length, "
                f"got {row['generated_tokens']}"
            )
    measured = rows[WARM_UP:]
    flops = engine_flops(events, rows[WARM_UP - 1]["end_ns"])
    generating = sum(row["seconds"]["generate"] for row in measured)

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(row) for row in measured)

    return report | {
        "work": asdict(work),
        "steps": steps,
        "seconds_per_step": median(lambda row: row["wall"]),
        "all_seconds": [row["wall"] for row in measured],
        "warm_up_seconds": [row["wall"] for row in rows[:WARM_UP]],
        "seconds_by_stage": {
            stage: median(lambda row, stage=stage: row["seconds"][stage])  # type: ignore[misc]
            for stage in ("generate", "reward", "gradient", "optimizer")
        },
        "generated_tokens": work.generated_tokens,
        "tokens_per_second": median(lambda row: row["tokens_per_second"]),
        "generate_fma_share": None
        if flops is None
        else flops / generating / 1e9 / report["limits"]["fma_gflops"],
        "kl_per_rewrite": median(lambda row: row["kl_per_rewrite"]),
        "reward_mean": median(lambda row: row["reward_mean"]),
        "parity_max_abs": max(row["parity_max_abs"] for row in rows),
        "peak_rss_bytes": peak,
    }


def forced_lengths(config: TrainConfig) -> TrainConfig:
    """The configuration with rewrites and responses that do not end before their last token.

    A `TrainConfig` refuses this for rewrites, because nobody should train that way: what follows
    an end would be trained on. A benchmark compares equal work, so it is set past the check here,
    and only here.
    """
    forced = replace(config, response=replace(config.response, ignore_eos=True))
    object.__setattr__(forced, "rewrite", replace(config.rewrite, ignore_eos=True))
    return forced
