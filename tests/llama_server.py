"""llama.cpp's own server on loopback, from the package xllamacpp: a process of its own.

Run as a program it serves: ``python llama_server.py MODEL.gguf PORT THREADS SLOTS``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback import free_port, serving


@contextlib.contextmanager
def llama_server(
    model: Path, port: int | None = None, *, threads: int = 2, slots: int = 4
) -> Iterator[str]:
    """The address of a server that has loaded ``model``; skips where the package is not there.

    slots: answers that it writes at a time, of 1024 tokens with their prompts.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp's server is not installed (package xllamacpp)")
    port = port or free_port()
    command = [sys.executable, __file__, *map(str, (model, port, threads, slots))]
    with serving(command, port, seconds=120):
        yield f"http://127.0.0.1:{port}/v1"


def _serve(model: str, port: int, threads: int, slots: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = slots, 1024 * slots
    for of in (params.cpuparams, params.cpuparams_batch):
        of.n_threads = threads
        of.poll = 0  # waits asleep: the cores are shared with who asks
    params.use_jinja, params.warmup, params.verbosity = True, False, 0
    server = xllamacpp.Server(params)
    print(server.listening_address)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
