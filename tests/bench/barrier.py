"""What a barrier between the two models costs: rollouts as they are, and with every rewrite
finished before the first response begins.

    python tests/bench/barrier.py [--model MODEL] [--prompts 16] [--repeats 5] [--threads N]

Both draw the same tokens from the same seeds: a round of each, and the next round with the next
seed. Rewrites end where they end, which is what a barrier waits for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from alignpro.bench.generation import rollout_pipeline, rollout_prompts
from alignpro.bench.work import ROLLOUT
from alignpro.models.native_model import load_model
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.pipeline import Pipeline


def interleaved(pipeline: Pipeline, prompts: list[str], seed: int) -> int:
    return pipeline.rollout(prompts, num_rewrites=ROLLOUT.rewrites, seed=seed).generated_tokens


def with_barrier(pipeline: Pipeline, prompts: list[str], seed: int) -> int:
    rewrites = pipeline.rewrite(prompts, num_rewrites=ROLLOUT.rewrites, seed=seed)
    written = sum(len(rewrite.tokens) for group in rewrites for rewrite in group)
    texts = [[rewrite.text for rewrite in group] for group in rewrites]
    return written + pipeline.answer(prompts, texts, seed=seed).generated_tokens


SIDES: tuple[Callable[[Pipeline, list[str], int], int], ...] = (interleaved, with_barrier)


def measure(model: Path, prompts: int, repeats: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every round by side, after one to warm up."""
    texts = rollout_prompts(prompts)
    seconds: dict[str, list[float]] = {side.__name__: [] for side in SIDES}
    for seed in range(repeats + 1):
        written = set()
        for side in SIDES:
            # What one side computed must not be found by the other in a prefix cache.
            loaded = load_model(model, threads=threads)
            pipeline = rollout_pipeline(loaded, loaded)
            begun = time.perf_counter()
            written.add(side(pipeline, texts, seed))
            seconds[side.__name__].append(time.perf_counter() - begun)
        if len(written) != 1:
            raise RuntimeError(f"seed {seed}: expected the same draws, got {written} tokens")
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=ROLLOUT.prompts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=core.available_cpus())
    options = parser.parse_args()
    seconds = measure(
        resolve_model(options.model), options.prompts, options.repeats, options.threads
    )
    for name, values in seconds.items():
        print(f"{name:12} {statistics.median(values):.2f} s")
    ratios = [b / i for i, b in zip(*seconds.values(), strict=True)]
    print(f"with a barrier over interleaved: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
