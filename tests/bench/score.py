"""The vocabulary op and a LoRA pass, ours beside torch and what else is installed.

    python tests/bench/score.py [--model MODEL] [--json FILE] [--repeats 5] [--threads N]
                                [--shape VOCABULARYxHIDDEN ...] [--tokens N ...] [--no-peers]

All are shares of limits measured in the same run. --model adds its head, and its LoRA pass.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from alignpro.bench.machine import interleaved, limits, machine
from alignpro.bench.tables import limits_text, new_table, seconds_text
from alignpro.cli.shared import check_new, write_json
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.ops import get_num_threads, peak_bytes, set_num_threads

sys.path.insert(0, str(Path(__file__).resolve().parent))

import heads
import lora_pass
from heads import HeadInputs, HeadSpec, Unavailable
from memory import extra_bytes_of

SHAPES = ((49152, 576), (151936, 896))  # SmolLM2-135M and Qwen2.5-0.5B: vocabulary x hidden
TOKENS = (256, 1024)
PACKAGES = ("transformers", "peft", "gguf", "liger-kernel", "triton")  # whose versions matter
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
            "machine": machine(threads, PACKAGES),
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


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and all values."""
    return {"seconds": statistics.median(seconds), "all_seconds": list(seconds)}


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


# --- tables ---


def score_tables(report: Mapping[str, Any]) -> Group:
    """Machine limits, two tables for each head, and the LoRA pass.

    "x ours" is in seconds, against ours for the same outputs.
    """
    parts: list[RenderableType] = [Text(limits_text(report))]
    for head in report["heads"]:
        parts += _head_tables(head)
    if report["lora_pass"] is not None:
        parts += _lora_tables(report["lora_pass"])
    return Group(*parts)


_PASSES = {"forward": "forward", "forward_backward": "forward and backward"}


def _head_tables(head: Mapping[str, Any]) -> Iterator[RenderableType]:
    stored = f", stored as {head['stored_as']}" if head["stored_as"] else ""
    name = (
        f"{head['vocab_size']} x {head['hidden_size']} ({head['weight']} weight{stored}), "
        f"{head['num_tokens']} tokens"
    )
    for key, title in _PASSES.items():
        table = new_table(f"{name}: {title}")
        for column in ("KL", "time", "x ours", "GFLOP/s", "of peak", "extra MiB"):
            table.add_column(column, justify="right")
        for row in head["implementations"]:
            if key in row:
                table.add_row(*(Text(cell) for cell in _head_cells(row, row[key])))
        yield table
    yield from _reasons(head["implementations"])


def _head_cells(row: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    yield row["name"]
    yield "yes" if "KL" in row["computes"] else "no"
    yield seconds_text(values["seconds"])
    yield f"{values['ratio']:.2f}"
    yield f"{values['gflops']:.0f}"
    yield f"{values['fma_share']:.0%}"
    yield _mib(values["extra_bytes"])


def _lora_tables(lora: Mapping[str, Any]) -> Iterator[RenderableType]:
    table = new_table(
        f"LoRA of rank {lora['rank']} on all linear layers, {lora['sequences']} x "
        f"{lora['tokens_each']} tokens: forward and backward"
    )
    for name in ("time", "x ours", "extra MiB", "nats per token"):
        table.add_column(name, justify="right")
    for row in lora["sides"]:
        if row["skipped"] is None:
            cells = (
                row["name"],
                seconds_text(row["seconds"]),
                f"{row['ratio']:.2f}",
                _mib(row["extra_bytes"]),
                f"{row['nats_per_token']:.6f}",
            )
            table.add_row(*(Text(cell) for cell in cells))
    yield table
    yield from _reasons(lora["sides"])


def _reasons(rows: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """Why a row has no numbers."""
    for row in rows:
        if row["skipped"] is not None:
            yield Text(f"skipped {row['name']}: {row['skipped']}")


def _mib(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**20:,.1f}"


def _shape(text: str) -> tuple[int, int]:
    vocabulary, _, hidden = text.partition("x")
    if not (vocabulary.isdecimal() and hidden.isdecimal() and int(vocabulary) and int(hidden)):
        raise argparse.ArgumentTypeError(
            f"expected VOCABULARYxHIDDEN, such as 49152x576, got {text!r}"
        )
    return int(vocabulary), int(hidden)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=core.available_cpus())
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--shape", type=_shape, action="append")
    parser.add_argument("--tokens", type=int, action="append")
    options = parser.parse_args(arguments)
    check_new(options.json)
    with Console(stderr=True).status("") as status:
        report = bench_score(
            model=None if options.model is None else resolve_model(options.model),
            shapes=options.shape or SHAPES,
            tokens=options.tokens or TOKENS,
            threads=options.threads,
            repeats=options.repeats,
            peers=not options.no_peers,
            say=status.update,
        )
    write_json(options.json, report)
    Console().print(score_tables(report))


if __name__ == "__main__":
    main()
