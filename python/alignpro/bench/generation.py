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
from alignpro.native import core
from alignpro.pipeline import Pipeline
from alignpro.types import Prompt, Reward, SamplingParams

Say = Callable[[str], None]

_VALUE_BYTES = {"float32": 4, "float16": 2}  # of a number in the cache
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
    top_p: float = 1.0,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Tokens a second by batch, each sequence with a prompt of its own, temperature 1.

    ``tokens_per_second`` counts new tokens over the whole call, prefill included;
    ``decode_tokens_per_second`` leaves out the time to the first token, measured by calls that
    stop there. ``cold_start_seconds`` is a new process up to its first token, interpreter and
    imports included, with the file in the system's cache. Shares are of the limits measured in the
    same run: operations of the whole call, by the engine's own counts (None where they did not
    fit), and weights and KV read from memory while decoding. With ``top_p`` below 1 the same calls
    are made with it as well, and ``truncated_share`` is their rate as a share of the rate without.
    """
    loaded, report = open_report(
        "decode", model, threads, repeats, compute=compute, kv_dtype=kv_dtype
    )
    say("a new process, to its first token")
    report |= {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "top_p": top_p,
        "cold_start_seconds": statistics.median(
            _cold_start(model, threads, compute, kv_dtype) for _ in range(repeats)
        ),
        "results": [],
    }
    config = loaded.config
    kv_bytes = core.describe(core.ModelFiles(str(model))).kv_elements * _VALUE_BYTES[kv_dtype]
    for batch in batches:
        say(f"{batch} sequences")
        prompts = random_prompts(config["vocab_size"], batch, prompt_tokens)
        _, events = recorded(partial(_generate, loaded, prompts, new_tokens))
        calls = {
            "first": partial(_generate, loaded, prompts, 1),
            "all": partial(_generate, loaded, prompts, new_tokens),
        }
        if top_p < 1:
            calls["truncated"] = partial(_generate, loaded, prompts, new_tokens, top_p)
        seconds = interleaved(calls, repeats)
        first, whole = (statistics.median(seconds[name]) for name in ("first", "all"))
        flops = engine_flops(events)
        decoding = max(whole - first, 1e-9)
        steps = new_tokens - 1
        held = batch * (prompt_tokens + new_tokens / 2)  # positions, on average
        moved = steps * (config["streamed_bytes"] + held * kv_bytes)
        report["results"].append(
            {
                "batch": batch,
                "tokens_per_second": batch * new_tokens / whole,
                "seconds": whole,
                "all_seconds": seconds["all"],
                "seconds_to_first_token": first,
                "decode_tokens_per_second": batch * steps / decoding if steps else None,
                "flops_per_token": None if flops is None else flops / (batch * new_tokens),
                "bytes_per_step": moved / steps if steps else None,
                **_rate(flops, whole, report),
                "read_share": moved / decoding / 1e9 / report["limits"]["read_gbps"]
                if steps
                else None,
                "truncated_share": whole / statistics.median(seconds["truncated"])
                if top_p < 1
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
    """Prompt tokens a second for (sequences, tokens each), up to and with the first token."""
    loaded, report = open_report(
        "prefill", model, threads, repeats, compute=compute, kv_dtype=kv_dtype
    )
    report["results"] = []
    for batch, length in shapes:
        say(f"{batch} x {length}")
        prompts = random_prompts(loaded.config["vocab_size"], batch, length)
        call = partial(_generate, loaded, prompts, 1)
        _, events = recorded(call)
        seconds = interleaved({"all": call}, repeats)["all"]
        whole = statistics.median(seconds)
        report["results"].append(
            {
                "batch": batch,
                "prompt_tokens": length,
                "tokens_per_second": batch * length / whole,
                "seconds_to_first_token": whole,
                "all_seconds": seconds,
                **_rate(engine_flops(events), whole, report),
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
    """
    texts = rollout_prompts(prompts)
    loaded, report = open_report("rollout", model, threads, repeats)
    del loaded
    rounds = []
    for seed in range(repeats + 1):
        say(f"round {seed}")
        prompter = load_model(model, threads=threads)
        answerer = prompter if target is None else load_model(target, threads=threads)
        pipeline = rollout_pipeline(prompter, answerer)

        def timed(pipeline: Pipeline = pipeline, seed: int = seed) -> tuple[int, float]:
            begun = time.perf_counter()
            done = pipeline.rollout(texts, num_rewrites=ROLLOUT.rewrites, seed=seed)
            return done.generated_tokens, time.perf_counter() - begun

        (tokens, took), events = recorded(timed)
        rounds.append((tokens, took, _rate(engine_flops(events), took, report)))
    del rounds[0]  # it warmed up
    known = [rate["gflops"] for *_, rate in rounds if rate["gflops"] is not None]
    gflops = statistics.median(known) if known else None
    return report | {
        "target": None if target is None else str(target),
        "prompts": len(texts),
        "rewrites": ROLLOUT.rewrites,
        "generated_tokens": [tokens for tokens, *_ in rounds],
        "tokens_per_second": statistics.median(tokens / took for tokens, took, _ in rounds),
        "seconds": statistics.median(took for _, took, _ in rounds),
        "all_seconds": [took for _, took, _ in rounds],
        "gflops": gflops,
        "fma_share": None if gflops is None else gflops / report["limits"]["fma_gflops"],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def rollout_prompts(count: int) -> list[Prompt]:
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


def open_report(
    benchmark: str,
    model: Path,
    threads: int,
    repeats: int,
    limits_now: dict[str, float] | None = None,
    prefix_cache: bool = False,
    lookup: bool = False,
    **options: Any,
) -> tuple[NativeModel, dict[str, Any]]:
    """The model, and what every report begins with.

    options: of `load_model`. The machine's limits, unless they are known, are measured before the
    model is loaded, and what they held is left out of the peak memory.
    """
    limits_now = limits_now or limits(threads, repeats)
    started = time.perf_counter()
    loaded = load_model(model, threads=threads, prefix_cache=prefix_cache, lookup=lookup, **options)
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


def _rate(flops: int | None, seconds: float, report: dict[str, Any]) -> dict[str, float | None]:
    if flops is None:
        return {"gflops": None, "fma_share": None}
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


def _generate(
    model: NativeModel, prompts: list[list[int]], new_tokens: int, top_p: float = 1.0
) -> None:
    params = [
        SamplingParams(max_new_tokens=new_tokens, top_p=top_p, ignore_eos=True, seed=index)
        for index in range(len(prompts))
    ]
    model.generate(prompts, params)
