"""`alignpro bench decode|prefill|rollout`: generation, as shares of what this machine can do."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alignpro.bench.machine import interleaved, limits, machine, peak_rss_bytes, recorded
from alignpro.bench.timeline import engine_flops
from alignpro.bench.work import ROLLOUT, random_prompts
from alignpro.config import RESPONSE, REWRITE
from alignpro.data.load import load_prompts
from alignpro.models.native_model import NativeModel, load_model
from alignpro.pipeline import Pipeline
from alignpro.types import Reward, SamplingParams

Say = Callable[[str], None]

PROMPT_TOKENS = 37  # a short question in its chat template


def bench_decode(
    *,
    model: Path,
    batches: Sequence[int],
    new_tokens: int,
    prompt_tokens: int = PROMPT_TOKENS,
    repeats: int = 5,
    threads: int,
    compute: str = "float32",
    kv_dtype: str = "float32",
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Tokens a second by batch, each sequence with a prompt of its own, temperature 1.

    ``tokens_per_second`` counts new tokens over the whole call, prefill included;
    ``decode_tokens_per_second`` leaves out the time to the first token, measured by calls that
    stop there. ``cold_start_seconds`` is a new process up to its first token, interpreter and
    imports included, with the file in the system's cache. Shares are of the limits measured in the
    same run: multiply-adds of the whole call, and weights and KV read from memory while decoding.

    Raises:
        ValueError, OSError: a model that does not load, or whose context is too short.
    """
    loaded, report = open_report(
        "decode", model, threads, repeats, compute=compute, kv_dtype=kv_dtype
    )
    say("a new process, to its first token")
    report |= {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "cold_start_seconds": statistics.median(
            _cold_start(model, threads, compute, kv_dtype) for _ in range(repeats)
        ),
        "results": [],
    }
    work, vocab_size = _Work(loaded), loaded.config["vocab_size"]
    for batch in batches:
        say(f"{batch} sequences")
        prompts = random_prompts(vocab_size, batch, prompt_tokens)
        seconds = interleaved(
            {
                "first": partial(_generate, loaded, prompts, 1),
                "all": partial(_generate, loaded, prompts, new_tokens),
            },
            repeats + 1,
        )
        first, whole = (statistics.median(seconds[name][1:]) for name in ("first", "all"))
        flops = (
            batch * (work.flops(prompt_tokens, 0) + work.flops(new_tokens - 1, prompt_tokens))
            + batch * new_tokens * work.head_flops
        )
        decoding = max(whole - first, 1e-9)
        steps = new_tokens - 1
        moved = steps * (work.weight_bytes + batch * work.kv_bytes(prompt_tokens + new_tokens / 2))
        report["results"].append(
            {
                "batch": batch,
                "tokens_per_second": batch * new_tokens / whole,
                "seconds": whole,
                "all_seconds": seconds["all"][1:],
                "seconds_to_first_token": first,
                "decode_tokens_per_second": batch * steps / decoding if steps else None,
                "flops_per_token": flops / (batch * new_tokens),
                "bytes_per_step": moved / steps if steps else None,
                **_rate(flops, whole, report),
                "read_share": moved / decoding / 1e9 / report["limits"]["read_gbps"]
                if steps
                else None,
            }
        )
    report["peak_rss_bytes"] = peak_rss_bytes()
    return report


def bench_prefill(
    *,
    model: Path,
    shapes: Sequence[tuple[int, int]],
    repeats: int = 5,
    threads: int,
    compute: str = "float32",
    kv_dtype: str = "float32",
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Prompt tokens a second for (sequences, tokens each), up to and with the first token.

    Raises as `bench_decode`.
    """
    loaded, report = open_report(
        "prefill", model, threads, repeats, compute=compute, kv_dtype=kv_dtype
    )
    report["results"] = []
    work, vocab_size = _Work(loaded), loaded.config["vocab_size"]
    for batch, length in shapes:
        say(f"{batch} x {length}")
        prompts = random_prompts(vocab_size, batch, length)
        seconds = interleaved({"all": partial(_generate, loaded, prompts, 1)}, repeats + 1)
        whole = statistics.median(seconds["all"][1:])
        flops = batch * (work.flops(length, 0) + work.head_flops)
        report["results"].append(
            {
                "batch": batch,
                "prompt_tokens": length,
                "tokens_per_second": batch * length / whole,
                "seconds_to_first_token": whole,
                "all_seconds": seconds["all"][1:],
                **_rate(flops, whole, report),
            }
        )
    report["peak_rss_bytes"] = peak_rss_bytes()
    return report


def bench_rollout(
    *,
    model: Path,
    target: Path | None = None,
    prompts: int = ROLLOUT.prompts,
    repeats: int = 5,
    threads: int,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """prompt -> rewrite -> response for real prompts; texts end where they end.

    Each round has a seed and engines of its own, so that nothing is found in a prefix cache. The
    share of the machine's multiply-adds is by the engine's own counts.

    Raises as `bench_decode`.
    """
    texts = rollout_prompts(prompts)
    loaded, report = open_report("rollout", model, threads, repeats)
    del loaded
    seconds, tokens, gflops = [], [], []
    for seed in range(repeats + 1):
        say(f"round {seed}")
        prompter = load_model(model, threads=threads)
        answerer = prompter if target is None else load_model(target, threads=threads)
        pipeline = rollout_pipeline(prompter, answerer)

        def timed(pipeline: Pipeline = pipeline, seed: int = seed) -> tuple[int, float]:
            begun = time.perf_counter()
            done = pipeline.rollout(texts, num_rewrites=ROLLOUT.rewrites, seed=seed)
            return done.generated_tokens, time.perf_counter() - begun

        (written, took), events = recorded(timed)
        seconds.append(took)
        tokens.append(written)
        flops = engine_flops(events)
        gflops.append(None if flops is None else flops / took / 1e9)
    known = [rate for rate in gflops[1:] if rate is not None]
    rate = statistics.median(known) if known else None
    return report | {
        "target": None if target is None else str(target),
        "prompts": len(texts),
        "rewrites": ROLLOUT.rewrites,
        "generated_tokens": tokens[1:],
        "tokens_per_second": statistics.median(
            n / s for n, s in zip(tokens[1:], seconds[1:], strict=True)
        ),
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds[1:],
        "gflops": rate,
        "fma_share": None if rate is None else rate / report["limits"]["fma_gflops"],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def rollout_prompts(count: int) -> list[str]:
    """The first prompts of the set that rollouts are measured on."""
    rows = load_prompts(ROLLOUT.data, split=ROLLOUT.split)
    if count > len(rows):
        raise ValueError(f"prompts: expected at most {len(rows)}, got {count}")
    return [row.prompt for row in rows[:count]]


def rollout_pipeline(
    prompter: NativeModel,
    target: NativeModel,
    reward: Reward | None = None,
    prompter_adapter: Any = None,
) -> Pipeline:
    """With the lengths of `RolloutWork`."""
    return Pipeline(
        prompter,
        target,
        reward,
        prompter_adapter=prompter_adapter,
        rewrite_params=replace(REWRITE, max_new_tokens=ROLLOUT.rewrite_tokens),
        response_params=replace(RESPONSE, max_new_tokens=ROLLOUT.response_tokens),
    )


class _Work:
    """What one token costs, by count: a multiply-add is two operations."""

    def __init__(self, model: NativeModel) -> None:
        c = model.config
        heads, kv_heads, d = c["num_heads"], c["num_kv_heads"], c["head_dim"]
        of_layer = (2 * heads + 2 * kv_heads) * d + 3 * c["intermediate_size"]
        self._linear_flops: int = 2 * c["num_layers"] * c["hidden_size"] * of_layer
        self._attention_flops: int = 4 * c["num_layers"] * heads * d  # a pair of positions
        value_bytes = {"float32": 4, "float16": 2}[c["kv_dtype"]]
        self._kv_bytes: int = 2 * value_bytes * c["num_layers"] * kv_heads * d  # K and V
        self.head_flops = 2 * c["vocab_size"] * c["hidden_size"]
        self.weight_bytes: int = c["streamed_bytes"]

    def flops(self, tokens: int, before: int) -> float:
        """Of ``tokens`` positions after ``before`` others, without the head."""
        looked_at = tokens * before + tokens * (tokens + 1) / 2
        return tokens * self._linear_flops + looked_at * self._attention_flops

    def kv_bytes(self, positions: float) -> float:
        return positions * self._kv_bytes


def open_report(
    benchmark: str,
    model: Path,
    threads: int,
    repeats: int,
    limits_now: dict[str, float] | None = None,
    **options: Any,
) -> tuple[NativeModel, dict[str, Any]]:
    """The model, with nothing kept between calls, and what every report begins with.

    options: of `load_model`. The machine's limits, unless they are known, are measured before the
    model is loaded, and what they held is left out of the peak memory.
    """
    limits_now = limits_now or limits(threads, repeats)
    started = time.perf_counter()
    loaded = load_model(model, threads=threads, prefix_cache=False, **options)
    seconds = time.perf_counter() - started
    return loaded, {
        "benchmark": benchmark,
        "machine": machine(threads),
        "limits": limits_now,
        "model": loaded.name,
        "vocab_size": loaded.config["vocab_size"],
        "compute": loaded.config["compute"],
        "kv_dtype": loaded.config["kv_dtype"],
        "repeats": repeats,
        "load_seconds": seconds,
    }


def _rate(flops: float, seconds: float, report: dict[str, Any]) -> dict[str, float]:
    gflops = flops / seconds / 1e9
    return {"gflops": gflops, "fma_share": gflops / report["limits"]["fma_gflops"]}


_COLD_START = """
import sys
import alignpro
path, threads, compute, kv_dtype = sys.argv[1:]
model = alignpro.load_model(path, int(threads), compute=compute, kv_dtype=kv_dtype)
model.generate(["How do bees find home?"], alignpro.SamplingParams(max_new_tokens=1))
"""


def _cold_start(model: Path, threads: int, compute: str, kv_dtype: str) -> float:
    command = [sys.executable, "-c", _COLD_START, str(model), str(threads), compute, kv_dtype]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def _generate(model: NativeModel, prompts: list[list[int]], new_tokens: int) -> None:
    params = [
        SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=index)
        for index in range(len(prompts))
    ]
    model.generate(prompts, params)
