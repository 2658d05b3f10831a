"""What a target behind a server costs, and that training learns as before the same in process.

    python tests/bench/endpoint.py [--model smollm2] [--server llama.cpp] [--seeds 3] [--steps 8]
                                   [--prompts 8] [--compute float32] [--threads N]

For every seed two runs, one after the other and the later first in the next round: prompter and
target in this process, and the prompter here with the target behind a server on loopback. File,
prompts, seeds and settings are the same, and nothing is truncated, so both draw from one
distribution; a server's draws are its own. Prints the mean reward of every step, the paired
difference over steps and seeds with its interval (0 should lie in it), and how many times the
seconds in process a run before the server takes: of wall time, and of all cores' time with the
server's, which other work on the machine changes little.

Servers: llama.cpp (the package xllamacpp), whose arithmetic is its own, and alignpro, this engine
in another process, which leaves what HTTP and the split in two cost.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from alignpro.config import ClientConfig, ModelConfig, TrainConfig
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.statistics import paired_difference
from alignpro.train.metrics import read_metrics
from alignpro.train.run import make_trainer
from alignpro.types import SamplingParams

sys.path.append(str(Path(__file__).parents[1]))

from bench.engine_server import engine_server
from llama_server import llama_server

SIDES = ("in process", "server")


@dataclass(frozen=True)
class Run:
    rewards: list[float]  # by step, of all of its responses
    stages: dict[str, float]  # seconds
    seconds: float
    cpu_seconds: float  # of this process and the server
    tokens: int  # that the target wrote


def train(config: TrainConfig) -> Run:
    """One run, without loading models."""
    trainer = make_trainer(config)
    begun, cpu = time.perf_counter(), cpu_seconds()
    trainer.train()
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    stages: dict[str, float] = {}
    for row in rows:
        if row["failed_responses"]:
            raise RuntimeError(f"step {row['step']}: {row['failed_responses']} responses failed")
        for name, took in row["seconds"].items():
            stages[name] = stages.get(name, 0.0) + took
    rewards = [row["reward_mean"] for row in rows]
    return Run(rewards, stages, seconds, cpu, sum(row["target_tokens"] for row in rows))


def cpu_seconds() -> float:
    """Of this process and those that it started and that still run."""
    children = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            spent = child.cpu_times()
            children += spent.user + spent.system
    return time.process_time() + children


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Run]]:
    """Runs by side, one a seed."""
    model = resolve_model(options.model)
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for seed in range(options.seeds):
        settings: dict[str, Any] = {
            "prompter": ModelConfig(str(model)),
            "reward": options.reward,
            "steps": options.steps,
            "prompts_per_step": options.prompts,
            "num_rewrites": options.rewrites,
            "num_responses": options.responses,
            "learning_rate": options.learning_rate,
            "rewrite": SamplingParams(max_new_tokens=options.rewrite_tokens),
            "response": SamplingParams(max_new_tokens=options.response_tokens, temperature=0.7),
            "threads": options.threads,
            "seed": seed,
        }
        for side in SIDES if seed % 2 else SIDES[::-1]:
            settings["run_dir"] = str(folder / f"{side.replace(' ', '-')}-{seed}")
            if side == "in process":
                target = ModelConfig(str(model), compute=options.compute)
                runs[side].append(train(TrainConfig(target=target, **settings)))
                continue
            # A new one for every run: what it has read is not found by the next.
            with serve(options, model) as url:
                target = ModelConfig("target", endpoint=url)
                runs[side].append(train(TrainConfig(target=target, **settings)))
    return runs


def serve(options: argparse.Namespace, model: Path) -> AbstractContextManager[str]:
    threads = options.server_threads
    if options.server == "alignpro":
        return engine_server(model, threads, options.compute)
    return llama_server(model, threads=threads, slots=ClientConfig().concurrency)


def lines(runs: dict[str, list[Run]]) -> list[str]:
    """What was found, a line each."""
    ours, theirs = (runs[side] for side in SIDES)
    told = ["| step | in process | server |", "|---:|---:|---:|"]
    for step in range(len(ours[0].rewards)):
        means = [statistics.mean(run.rewards[step] for run in side) for side in (ours, theirs)]
        told.append(f"| {step} | {means[0]:.3f} | {means[1]:.3f} |")
    flat = [[reward for run in side for reward in run.rewards] for side in (theirs, ours)]
    mean, low, high = paired_difference(*flat)
    told.append(f"server - in process: {mean:+.3f} [{low:+.3f}, {high:+.3f}] of reward")
    for side, of in runs.items():
        stages = {
            name: sum(run.stages.get(name, 0.0) for run in of) / len(of) for name in of[0].stages
        }
        split = ", ".join(f"{name} {took:.2f}" for name, took in stages.items())
        tokens = statistics.mean(run.tokens for run in of)
        seconds = statistics.mean(run.seconds for run in of)
        told.append(f"{side}: {seconds:.2f} s a run ({split}); {tokens:.0f} tokens of the target")
    for what in ("seconds", "cpu_seconds"):
        ratios = [getattr(t, what) / getattr(o, what) for o, t in zip(ours, theirs, strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        told.append(f"{what}, server over in process: {statistics.median(ratios):.2f} ({listed})")
    return told


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpus = core.available_cpus()
    parser.add_argument("--model", default="smollm2", help="Prompter and target.")
    parser.add_argument("--server", choices=("llama.cpp", "alignpro"), default="llama.cpp")
    parser.add_argument("--seeds", type=int, default=3, help="Pairs of runs.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="Prompts a step.")
    parser.add_argument("--rewrites", type=int, default=2, help="Rewrites a prompt.")
    parser.add_argument("--responses", type=int, default=2, help="Responses a rewrite.")
    parser.add_argument("--rewrite-tokens", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--reward", default="vader")
    parser.add_argument("--compute", default="float32", help="Of the target in process.")
    parser.add_argument("--threads", type=int, default=cpus, help="Threads of the engine here.")
    parser.add_argument("--server-threads", type=int, default=cpus)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(options, Path(folder))
    print(*lines(runs), sep="\n")


if __name__ == "__main__":
    main()
