"""One measurement of memory, in a process of its own: ``python -m alignpro.bench.worker JSON``.

A process that has done the same work before holds memory that it would use again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_MARK = "extra bytes: "


def extra_bytes_of(request: dict[str, Any]) -> int | None:
    """Run the request in a fresh interpreter; None where it or the kernel cannot say."""
    command = [sys.executable, "-m", "alignpro.bench.worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            value = json.loads(line.removeprefix(_MARK))
            return value if value is None else int(value)
    return None


def measure(request: dict[str, Any]) -> int | None:
    """The request's extra memory, measured here."""
    import torch

    from alignpro.ops import set_num_threads

    torch.set_num_threads(request["threads"])
    set_num_threads(request["threads"])
    return _of_lora(request) if "lora" in request else _of_head(request)


def _of_head(request: dict[str, Any]) -> int | None:
    from alignpro.bench import heads
    from alignpro.bench.machine import extra_bytes

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
    from alignpro.bench import lora_pass
    from alignpro.bench.machine import extra_bytes

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
