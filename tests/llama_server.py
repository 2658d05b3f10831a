"""llama.cpp's own server on loopback, from the package xllamacpp: a process of its own.

Run as a program it serves: ``python llama_server.py MODEL.gguf PORT THREADS SLOTS``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 120  # for the model to be loaded, on a machine that does other things as well


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
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _wait_until_healthy(process, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < SECONDS:
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(f"llama.cpp's server ended: {process.stderr.read()[-800:].decode()}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"llama.cpp's server was not ready within {SECONDS} s")


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
