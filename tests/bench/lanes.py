"""What a mixture of K adapters decodes at, against one adapter: no less than 1 / K is promised.

    python tests/bench/lanes.py [--model MODEL] [--lanes 2,3] [--sequences 1,64] [--json FILE]

Made-up adapters of rank 16 on all linears, prompts that differ, decoding alone, without drafts: a
step under way when the clock starts. One adapter and the mixtures take turns. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from alignpro.models.adapter import LoraWeights
from alignpro.models.mixture import Mixture
from alignpro.models.native_model import NativeModel, load_model
from alignpro.types import SamplingParams


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lanes", type=_counts, default=[2, 3])
    parser.add_argument("--sequences", type=_counts, default=[1, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = measure(
        *(options.model, options.device, options.lanes, options.sequences),
        tokens=options.tokens,
        repeats=options.repeats,
        threads=options.threads,
    )
    print(
        "| sequences | lanes | tokens/s | of one adapter's | 1 / lanes |\n"
        "|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        print(
            f"| {row['sequences']} | {row['lanes']} | {row['tokens_per_second']:.1f} | "
            f"{row['share']:.2f} | {1 / row['lanes']:.2f} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(
    name: str,
    device: str,
    lanes: list[int],
    sequences: list[int],
    *,
    tokens: int,
    repeats: int,
    threads: int | None,
) -> list[dict[str, Any]]:
    rows = []
    most = max(lanes)
    model = load_model(
        name, threads, device=device, lookup=False, max_batch_rows=max(256, most * max(sequences))
    )
    adapters = [_adapter(model, seed) for seed in range(most)]
    writers: dict[int, Any] = {1: adapters[0]}
    for count in lanes:
        writers[count] = Mixture(tuple((adapters[k], 1 / count) for k in range(count)))
    for at_once in sequences:
        rates: dict[int, list[float]] = {count: [] for count in writers}
        for _ in range(repeats):
            for count, writer in writers.items():
                rates[count].append(_rate(model, writer, at_once, tokens))
        one = median(rates[1])
        rows += [
            {
                "sequences": at_once,
                "lanes": count,
                "tokens_per_second": median(rate),
                "share": median(rate) / one,
            }
            for count, rate in rates.items()
        ]
    return rows


def _rate(model: NativeModel, writer: Any, at_once: int, tokens: int) -> float:
    """Tokens a second of sequences that all decode."""
    params = SamplingParams(max_new_tokens=tokens + 1, seed=1, ignore_eos=True)
    client = model.client()
    handles = [
        client.submit([1 + i % 90, 5, 9, 2 + i % 7], params, adapter=writer, sample=i)
        for i in range(at_once)
    ]
    while not all(handle.sequence.tokens for handle in handles):
        client.step()
    before, began = sum(len(handle.sequence.tokens) for handle in handles), time.perf_counter()
    while not client.idle():
        client.step()
    seconds = time.perf_counter() - began
    return (sum(len(handle.sequence.tokens) for handle in handles) - before) / seconds


def _adapter(model: NativeModel, seed: int, rank: int = 16) -> LoraWeights:
    draw = np.random.default_rng(seed)
    matrices = {
        path: (
            draw.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32),
            draw.normal(0, 0.01, (outputs, rank)).astype(np.float32),
        )
        for path, (outputs, inputs) in model.lora_modules.items()
    }
    return LoraWeights(rank=rank, alpha=2.0 * rank, rslora=False, matrices=matrices)


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
