"""The peers, what each reads, and how it gets that from the model. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Unavailable, last_line, python_of

HERE = Path(__file__).resolve().parent
_HOURS = 2  # a peer that takes longer hangs


@dataclass(frozen=True)
class Peer:
    """A library in one of its variants."""

    name: str
    environment: str  # its requirements, and the folder of its virtual environment
    script: str
    reads: str  # gguf, float32 (a folder of safetensors), ctranslate2, or any
    benchmarks: tuple[str, ...] = ("decode", "prefill")
    variant: str = ""


PEERS = (
    Peer(
        "transformers",
        "transformers",
        "run_transformers.py",
        "float32",
        ("decode", "prefill", "rollout"),
    ),
    Peer("ctranslate2", "ctranslate2", "run_ctranslate2.py", "ctranslate2", variant="float32"),
    Peer("ctranslate2-int8", "ctranslate2", "run_ctranslate2.py", "ctranslate2", variant="int8"),
    Peer("llama.cpp", "llama-cpp", "run_llama_cpp.py", "gguf"),
    Peer("openvino", "openvino", "run_openvino.py", "gguf", variant="default"),
    Peer("openvino-float32", "openvino", "run_openvino.py", "gguf", variant="float32"),
    Peer("vllm", "vllm", "run_vllm.py", "float32"),
    Peer("trl", "trl", "run_trl.py", "any", ("step",)),
)


def run_peer(peer: Peer, request: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """The report of the peer's script; ``skipped`` in it says why a case has no numbers.

    Args:
        request: fields of `harness.Request` without the model and the variant.
        folder: of environments and of what was made from models.

    Raises:
        Unavailable: there is no environment, no model that the peer reads, or no result.
    """
    python = python_of(peer.environment, folder)
    readable = _readable(peer, model, folder)
    request = {**request, "model": str(readable), "variant": peer.variant}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [str(python), str(HERE / peer.script), json.dumps(request), str(report)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(request["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=_HOURS * 3600
            )
            reason = last_line(done.stderr) if done.returncode else ""
            if done.returncode < 0:
                reason = f"killed by signal {-done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {_HOURS} hours"
        if not report.exists():
            raise Unavailable(reason or "it wrote no report")
        result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {**result, "failed": reason}


def _readable(peer: Peer, model: Path, folder: Path) -> Path:
    """The model in the form that the peer reads, made once."""
    if peer.reads == "any":
        return model
    if peer.reads == "gguf":
        if model.is_dir():
            raise Unavailable(f"it reads GGUF files, and {model.name} is a folder")
        return model
    made = folder / "models" / _key(model)
    weights = model if model.is_dir() else made / "float32"
    if weights != model:
        _make(weights, "transformers", "convert_float32.py", [str(model)], [], folder)
    if peer.reads == "float32":
        return weights
    out = made / f"ctranslate2-{peer.variant}"
    _make(out, "ctranslate2", "convert_ctranslate2.py", [str(weights)], [peer.variant], folder)
    return out


def _make(
    out: Path, environment: str, script: str, before: list[str], after: list[str], folder: Path
) -> None:
    """Run a conversion, its output between the other arguments; a half-made one leaves nothing."""
    if out.exists():
        return
    python = python_of(environment, folder)
    half = out.with_name(out.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(HERE / script), *before, str(half), *after]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise Unavailable(f"{script}: {last_line(done.stderr)}")
    half.rename(out)


def _key(model: Path) -> str:
    """The model's name and a digest of its bytes: another file gets a folder of its own."""
    digest = hashlib.sha256()
    files = [model] if model.is_file() else sorted(p for p in model.iterdir() if p.is_file())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"{model.stem}-{digest.hexdigest()[:8]}"
