"""What a model's files hold, as a hash: the same wherever they lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.files import write_json
from alignpro.models.resolve import cache_dir

_MODEL_FILES = {".safetensors", ".json", ".jinja", ".model"}
_BLOCK, _HASHED_WHOLE = 1 << 20, 1 << 30  # bytes
# A GB takes 1.3 s, a second time 0.1 ms: what is known of larger models is kept by their stamps.
_REMEMBERED = 1 << 26
_KNOWN = "fingerprints.json"  # in the cache


def fingerprint(model: Path) -> str:
    """A hash of a model's weights, configuration and tokenizer, wherever they lie.

    Of a file over `_HASHED_WHOLE` it reads that much, in blocks all over the file: models that
    differ in every tensor differ in every block.
    """
    files = [model]
    if model.is_dir():
        files = sorted(f for f in model.iterdir() if f.suffix in _MODEL_FILES and f.is_file())
    stamp = [_stamp(file) for file in files]
    large = sum(size for _, size, *_ in stamp) >= _REMEMBERED
    if large:
        known = _known().get(str(model.resolve()))
        if isinstance(known, dict) and known.get("files") == stamp:
            return str(known["fingerprint"])
    value = _hash(files, named=model.is_dir())
    if large:
        # Read again: of processes that write at once the last one's entries stay, which is no harm.
        entry = {"files": stamp, "fingerprint": value}
        with contextlib.suppress(OSError):  # a cache that cannot be written is hashed every time
            cache_dir().mkdir(parents=True, exist_ok=True)
            write_json(cache_dir() / _KNOWN, {**_known(), str(model.resolve()): entry})
    return value


def _hash(files: Sequence[Path], *, named: bool) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name if named else ''} {size}\n".encode())
        blocks = -(-min(size, _HASHED_WHOLE) // _BLOCK)
        with path.open("rb") as file:
            for block in range(blocks):
                file.seek(block * _BLOCK if size <= _HASHED_WHOLE else size * block // blocks)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _stamp(file: Path) -> list[Any]:
    """Whatever is written to a file changes its time of change, which nobody can set."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _known() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads((cache_dir() / _KNOWN).read_text("utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
