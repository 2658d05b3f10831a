"""What the numbers depend on besides the code; the clock and the memory meter."""

from __future__ import annotations

import contextlib
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from alignpro.native import core

_PACKAGES = ("alignpro", "numpy", "tokenizers", "torch")
_SETTLE_SECONDS = 0.02  # a thread pool that has just worked spins for some milliseconds
Result = TypeVar("Result")


def machine(threads: int, packages: Sequence[str] = ()) -> dict[str, Any]:
    """CPU, threads and versions, those of ``packages`` among them where they are installed."""
    return {
        "cpu": _proc_value(Path("/proc/cpuinfo"), "model name")
        or platform.processor()
        or platform.machine(),
        "cpus": core.available_cpus(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "cpu_isa": core.cpu_isa(),
        "build": core.build_info(),
        "versions": versions([*_PACKAGES, *packages]),
    }


def limits(threads: int, repeats: int) -> dict[str, float]:
    """Medians of what the machine can do: GFLOP/s of multiply-adds, GB/s of reading memory.

    What they hold meanwhile (0.5 GB) is left out of `peak_rss_bytes`, with all else before, where
    the kernel can do that.
    """
    found = {
        "fma_gflops": statistics.median(core.measure_fma_peak(threads) for _ in range(repeats)),
        "read_gbps": statistics.median(
            core.measure_read_bandwidth(threads) for _ in range(repeats)
        ),
    }
    with contextlib.suppress(OSError):
        forget_high_water()
    return found


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, round by round, so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            time.sleep(_SETTLE_SECONDS)
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def recorded(
    call: Callable[[], Result], level: Literal["steps", "ops"] = "ops"
) -> tuple[Result, dict[str, Any]]:
    """What ``call`` returns, and what the engine recorded meanwhile (`_core.trace_stop`)."""
    core.trace_start(level)
    try:
        result = call()
    finally:
        events = core.trace_stop()
    return result, events


def percentiles(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rss_bytes() -> int | None:
    """Memory that this process holds; None where the kernel cannot say."""
    return proc_bytes(Path("/proc/self/status"), "VmRSS")


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the kernel cannot say."""
    return proc_bytes(Path("/proc/meminfo"), "MemAvailable")


def proc_bytes(path: Path, key: str) -> int | None:
    """A line "KEY: COUNT kB" of a file of the kernel's; None where it is not there."""
    value = _proc_value(path, key)
    return None if value is None else int(value.split()[0]) * 1024


def _proc_value(path: Path, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == key:
                return value.strip()
    return None


def forget_high_water() -> None:
    """The high-water mark becomes what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's, and those of ``packages`` as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
