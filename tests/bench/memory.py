"""One measurement of memory, in a process of its own: ``python tests/bench/memory.py JSON``.

A process that has done the same work before holds memory that it would use again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignpro.bench.machine import forget_high_water, proc_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent))

_MARK = "extra bytes: "


def extra_bytes_of(request: dict[str, Any]) -> int | None:
    """Run the request in a fresh interpreter; None where it or the kernel cannot say."""
    command = [sys.executable, __file__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            value = json.loads(line.removeprefix(_MARK))
            return value if value is None else int(value)
    return None


def extra_bytes(call: Callable[[], int]) -> int | None:
    """How far the memory of this process grows above what it holds now while ``call`` runs, less
    the bytes of results that ``call`` returns; None where the kernel cannot say.

    Meant for a process of its own: memory that an allocator has kept is not counted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        forget_high_water()
        before = _high_water()
    except OSError:
        return None
    results = call()
    return max(_high_water() - before - results, 0)


def _high_water() -> int:
    found = proc_bytes(Path("/proc/self/status"), "VmHWM")
    if found is None:
        raise OSError("no VmHWM")
    return found


def measure(request: dict[str, Any]) -> int | None:
    """The request's extra memory, measured here."""
    import torch

    from alignpro.ops import set_num_threads

    torch.set_num_threads(request["threads"])
    set_num_threads(request["threads"])
    return _of_lora(request) if "lora" in request else _of_head(request)


def _of_head(request: dict[str, Any]) -> int | None:
    import heads

    inputs = heads.make_inputs(heads.HeadSpec(**request["head"]))
    implementation = heads.BY_NAME[request["name"]]
    backward = bool(request["backward"])
    # Loads code, starts threads and touches a mapped weight.
    compute = heads.prepared(implementation, inputs if implementation.compiles else inputs.first(2))

    def run() -> int:
        if backward:
            outputs, _gradient = heads.forward_backward(compute, inputs)
        else:
            outputs = heads.forward(compute, inputs)
        return heads.result_bytes(inputs, len(outputs), backward)

    return extra_bytes(run)


def _of_lora(request: dict[str, Any]) -> int | None:
    import lora_pass

    side, tokens, gradient_bytes = lora_pass.make_pass(
        request["lora"], Path(request["model"]), request["threads"]
    )
    side.run([row[:2] for row in tokens[:2]])

    def run() -> int:
        side.run(tokens)
        return gradient_bytes

    return extra_bytes(run)


if __name__ == "__main__":
    print(_MARK + json.dumps(measure(json.loads(sys.argv[1]))))
