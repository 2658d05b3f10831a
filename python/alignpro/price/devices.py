"""What a machine can do at most, and what share of it was reached.

A graphics card's limits are those of its maker's data sheet: dense bfloat16 products with float32
sums, without sparsity. What this program reaches of them is known only once it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alignpro.bench.machine import available_bytes, limits
from alignpro.config.fields import Range, above, checked, from_mapping
from alignpro.native import core


@dataclass(frozen=True)
class Device:
    name: str
    gflops: float  # of multiply-adds, two operations each
    gbps: float  # of reading memory
    memory_bytes: int | None  # None: unknown
    source: str
    kv_bytes: int = 4  # of a number in the key-value cache


_Share = Annotated[float, Range(lambda v: bool(0 < v <= 1), "a share in (0, 1]")]
_Positive = Annotated[float, above(0)]


@dataclass(frozen=True)
@checked
class Rates:
    """Shares of the limits that were reached, and how the limits are to be taken instead."""

    generate: _Share  # of the operations, while many rows are decoded or read
    score: _Share  # of the operations, forward, backward and vocabulary
    bytes: _Share  # of the bandwidth, by weights and keys while decoding
    int8: _Positive = 1.0  # how many times the operations int8 products make
    gflops: _Positive | None = None  # in the place of the device's
    gbps: _Positive | None = None
    source: str = "docs/notes/performance.md"


# Measured on two cores with AVX-512 (docs/notes/performance.md): 64 rows decode at 77% of the
# multiply-add peak, a score with its backward runs at 63 to 70% of it, one row reads at 44 to
# 53% of the bandwidth; int8 is twice as fast.
CPU_RATES = Rates(generate=0.75, score=0.65, bytes=0.5, int8=2.0)

_GB = 10**9
_SHEETS = {
    # name: TFLOP/s, GB/s, GB
    "H200": (989.0, 4800.0, 141),
    "H100": (989.0, 3350.0, 80),
    "H100-PCIe": (756.0, 2000.0, 80),
    "A100": (312.0, 2039.0, 80),
    "A100-40GB": (312.0, 1555.0, 40),
    "L40S": (362.0, 864.0, 48),
    "L4": (121.0, 300.0, 24),
}


def gpu(name: str) -> Device:
    """A graphics card by its name, in any case."""
    for known, (tflops, gbps, gigabytes) in _SHEETS.items():
        if known.lower() == name.lower():
            # 16 bits are what a card would keep keys and values in.
            return Device(known, tflops * 1e3, gbps, gigabytes * _GB, "data sheet", kv_bytes=2)
    raise ValueError(f"--gpu: expected one of {', '.join(_SHEETS)}, got {name!r}")


def this_cpu(threads: int | None, rates: Rates) -> Device:
    """This machine; its limits are measured now, unless ``rates`` bring them."""
    count = threads or core.available_cpus()
    name = f"this CPU, {count} threads"
    if rates.gflops is not None and rates.gbps is not None:
        return Device(name, rates.gflops, rates.gbps, available_bytes(), rates.source)
    found = limits(count, repeats=3)
    return Device(name, found["fma_gflops"], found["read_gbps"], available_bytes(), "measured now")


def read_rates(file: Path) -> Rates:
    """Rates from a JSON object of `Rates`' fields; ``source`` becomes the file's name."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, Mapping) or not {"generate", "score", "bytes"} <= found.keys():
        raise ValueError(f"{file}: expected an object with generate, score and bytes, got {found}")
    try:
        return from_mapping(Rates, {**found, "source": file.name})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
