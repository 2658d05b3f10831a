"""Servers on loopback that tests start from packages, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path],
    port: int,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a server that answers at ``/health``, for the model to be loaded within
    ``seconds``, on a machine that does other things as well."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=said,
            stderr=said,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # its own children end with it
        )
        try:
            begin = time.monotonic()
            while not _healthy(port):
                late = time.monotonic() - begin > seconds
                if late or process.poll() is not None:
                    said.seek(0)
                    what = f"not ready within {seconds:g} s" if late else "ended"
                    end = said.read()[-3000:].decode("utf-8", "replace")
                    raise RuntimeError(f"{Path(command[0]).name}: {what}: {end}")
                time.sleep(0.2)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and its children; one that is gone already stays so."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except (OSError, urllib.error.URLError):
        return False
    return True
