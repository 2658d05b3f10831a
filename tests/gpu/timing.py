"""Medians of single calls, and the machine's limits to hold them against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gpu.calls import DEVICE, EMULATED
from gpu.cases import normal, sizes

Row = dict[str, object]


def synchronize() -> None:
    if not EMULATED:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], repeats: int = 15) -> float:
    """By CUDA events, the L2 cache overwritten before each."""
    if EMULATED:  # the script runs, and that is all that is asked
        return 1e3 * seconds(function)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def seconds(function: Callable[[], object]) -> float:
    """Of one call and what it put on the device, on the wall's clock."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def limits() -> dict[str, float]:
    """The matrix rate that torch reaches in bfloat16, and the rate at which it reads memory."""
    n = sizes(8192, 64)
    a, b = (normal(n, n, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(sizes(2 << 30, 1 << 20), dtype=torch.uint8, device=DEVICE).random_(0, 255)
    words = big.view(torch.int64)
    return {
        "matrix_tflops": 2 * n**3 / milliseconds(lambda: a @ b) / 1e9,
        "read_gbps": big.numel() / milliseconds(lambda: words.sum()) / 1e6,
    }


def row(op: str, work: str, ours: float, torchs: float | None, **shares: float) -> Row:
    return {"op": op, "work": work, "ours_ms": ours, "torch_ms": torchs, **shares}
