"""`alignpro bench score`: the vocabulary op and the LoRA pass, as shares of machine limits."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignpro.bench import heads, lora_pass
from alignpro.bench.heads import HeadInputs, HeadSpec, Unavailable
from alignpro.bench.machine import interleaved, limits, machine, spread
from alignpro.bench.worker import extra_bytes_of
from alignpro.models.native_model import NativeModel, load_model
from alignpro.ops import get_num_threads, peak_bytes, set_num_threads

SHAPES = ((49152, 576), (151936, 896))  # SmolLM2-135M and Qwen2.5-0.5B: vocabulary x hidden
TOKENS = (256, 1024)
_CHECKED_TOKENS = 16

Say = Callable[[str], None]


def bench_score(
    *,
    model: Path | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    threads: int,
    repeats: int = 5,
    peers: bool = True,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Everything that was measured, as plain values.

    Args:
        model: adds its own head, in the place of a random one of that shape, and the LoRA pass.
        peers: measure the others as well.
        say: told what is being done.

    Raises:
        ValueError, OSError: a model that does not load.
    """
    with _threads(threads):
        loaded = None
        if model is not None:
            say(f"loading {model.name}")
            loaded = load_model(model, threads=threads)
        specs = _specs(model, loaded, shapes, tokens)
        say("measuring the machine")
        report: dict[str, Any] = {
            "benchmark": "score",
            "machine": machine(threads),
            "repeats": repeats,
            "model": None if model is None else model.name,
            "limits": limits(threads, repeats),
        }
        peak = report["limits"]["fma_gflops"]
        report["heads"] = [_bench_head(spec, threads, repeats, peers, peak, say) for spec in specs]
        report["lora_pass"] = (
            None
            if loaded is None
            else _bench_lora(loaded.path, loaded, threads, repeats, peers, say)
        )
        return report


def _specs(
    path: Path | None,
    model: NativeModel | None,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
) -> list[HeadSpec]:
    named: list[tuple[tuple[int, int], str | None]] = [(shape, None) for shape in shapes]
    if model is not None:
        own = (int(model.config["vocab_size"]), int(model.config["hidden_size"]))
        named = [(own, str(model.path)), *((s, None) for s in shapes if s != own)]
    return [HeadSpec(*shape, count, file) for shape, file in named for count in tokens]


# --- the vocabulary op ---


def _bench_head(
    spec: HeadSpec, threads: int, repeats: int, peers: bool, peak: float, say: Say
) -> dict[str, Any]:
    title = f"{spec.vocab_size} x {spec.hidden_size}, {spec.num_tokens} tokens"
    say(f"{title}: inputs")
    inputs = heads.make_inputs(spec)
    chosen = [*heads.OURS, *(heads.PEERS if peers else ())]
    torch.compiler.reset()
    ready: dict[str, heads.Compute] = {}
    rows: dict[str, dict[str, Any]] = {}
    for one in chosen:
        rows[one.name] = {"name": one.name, "computes": one.computes, "skipped": None}
        say(f"{title}: {one.name}, first run")
        try:
            ready[one.name] = heads.prepared(one, inputs)
        except Unavailable as reason:
            rows[one.name]["skipped"] = str(reason)
    say(f"{title}: timing {len(ready)} implementations")
    forward = interleaved(
        {name: functools.partial(heads.forward, call, inputs) for name, call in ready.items()},
        repeats,
    )
    both = interleaved(
        {n: functools.partial(heads.forward_backward, call, inputs) for n, call in ready.items()},
        repeats,
    )
    if "torch" in ready:
        few = inputs.first(_CHECKED_TOKENS)
        for one in chosen:
            # A compiled one would be compiled again for the smaller shape, and a random weight is
            # not the stored one.
            same = not (inputs.is_random and one is heads.STORED)
            if one.name in ready and same and not one.compiles:
                rows[one.name]["difference_from_torch"] = dict(
                    heads.differences(ready[one.name], ready["torch"], few)
                )
    for one in chosen:
        if one.name in ready:
            for phase, seconds in (("forward", forward), ("forward_backward", both)):
                index = phase == "forward_backward"
                rows[one.name][phase] = {
                    **spread(seconds[one.name]),
                    **_rates(one, inputs, seconds[one.name], index, peak),
                }
    stored = None if inputs.stored is None else inputs.stored.dtype
    weight = "random" if inputs.is_random else "the model's"
    deviation = float((inputs.hidden[:8] @ inputs.weight.T).std())
    del inputs, ready
    gc.collect()
    for one in chosen:
        for phase in ("forward", "forward_backward"):
            if phase in rows[one.name]:
                say(f"{title}: {one.name}, memory")
                backward = phase == "forward_backward"
                rows[one.name][phase]["extra_bytes"] = extra_bytes_of(
                    {
                        "head": asdict(spec),
                        "name": one.name,
                        "backward": backward,
                        "threads": threads,
                    }
                )
                if one.ours:
                    rows[one.name][phase]["promised_bytes"] = peak_bytes(
                        spec.num_tokens,
                        spec.hidden_size,
                        spec.vocab_size,
                        dtype=stored if stored and one is heads.STORED else "F32",
                        reference=one.computes == heads.BOTH,
                        gradient=backward,
                    )
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_tokens": spec.num_tokens,
        "weight": weight,
        "stored_as": stored,
        "logit_deviation": deviation,
        "implementations": _with_ratios(list(rows.values())),
    }


def _rates(
    one: heads.Implementation,
    inputs: HeadInputs,
    seconds: Sequence[float],
    backward: bool,
    peak: float,
) -> dict[str, float]:
    """GFLOP/s by the fewest products that do, and the share of the peak by those that are run."""
    product = 2e-9 * len(inputs.tokens) * inputs.weight.numel()
    median = spread(seconds)["seconds"]
    return {
        "gflops": one.least_products[backward] * product / median,
        "products_run": one.products[backward],
        "fma_share": one.products[backward] * product / median / peak,
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times the seconds of ours, for the same outputs, each one takes."""
    ours = {one.computes: one.name for one in (heads.FLOAT32, heads.NO_REFERENCE)}
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        for phase in ("forward", "forward_backward"):
            if phase in row:
                base = by_name[ours[row["computes"]]][phase]["seconds"]
                row[phase]["ratio"] = row[phase]["seconds"] / base
    return rows


# --- the LoRA pass ---


def _bench_lora(
    path: Path, model: NativeModel, threads: int, repeats: int, peers: bool, say: Say
) -> dict[str, Any]:
    tokens = lora_pass.make_tokens(int(model.config["vocab_size"]), model.context_length)
    sides = {
        name: lora_pass.ours(model, name) for name in (lora_pass.OURS, lora_pass.OURS_RECOMPUTING)
    }
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "skipped": None} for name in sides}
    if peers:
        say("LoRA pass: loading the model in transformers")
        try:
            loaded = lora_pass.load_peer(path, lora_pass.make_weights(model))
            sides |= {name: lora_pass.peer(loaded, name) for name in lora_pass.PEERS}
            rows |= {name: {"name": name, "skipped": None} for name in lora_pass.PEERS}
        except Unavailable as reason:
            rows |= {name: {"name": name, "skipped": str(reason)} for name in lora_pass.PEERS}
    losses = {}
    for name, side in sides.items():
        say(f"LoRA pass: {name}, first run")
        losses[name] = side.run(tokens)
    say("LoRA pass: timing")
    seconds = interleaved(
        {name: functools.partial(side.run, tokens) for name, side in sides.items()}, repeats
    )
    for name, side in sides.items():
        say(f"LoRA pass: {name}, memory")
        rows[name] |= {
            **spread(seconds[name]),
            "ratio": spread(seconds[name])["seconds"] / spread(seconds[lora_pass.OURS])["seconds"],
            "extra_bytes": extra_bytes_of({"lora": name, "model": str(path), "threads": threads}),
            "nats_per_token": losses[name] / (len(tokens) * (len(tokens[0]) - 1)),
        }
        if lora_pass.PEER in sides and name not in lora_pass.PEERS:
            sides[lora_pass.PEER].run(tokens)
            rows[name]["gradient_difference_from_peer"] = lora_pass.gradient_difference(
                side, sides[lora_pass.PEER]
            )
    return {
        "sequences": len(tokens),
        "tokens_each": len(tokens[0]),
        "rank": lora_pass.RANK,
        "sides": list(rows.values()),
    }


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    """So many for torch and for our ops, and what they were afterwards."""
    before = torch.get_num_threads(), get_num_threads()
    torch.set_num_threads(threads)
    set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        set_num_threads(before[1])
