"""The two files of an adapter in PEFT's layout, adapter_config.json and adapter_model.safetensors,
and base_model.json beside them: what it was trained for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpro.files import check_fetched, sync_folder, write_file, write_json

Matrix = NDArray[np.float32]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MIXTURE = "mixture.json"  # of several; see models.mixture
_BASE = "base_model.json"


def adapter_folder(folder: str | Path) -> Path:
    """The folder of an adapter's files: this one, or the one beneath it that has them, where PEFT
    puts an adapter that has a name. A mixture's is its own.

    Raises:
        FileNotFoundError: none has, or several have.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() or is_mixture(folder):
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(found) == 1:
        return found[0]
    expected = "expected the folder of a PEFT adapter"
    if found:
        names = ", ".join(path.name for path in found)
        raise FileNotFoundError(f"{folder}: {expected}, got one with several: {names}; pass one")
    if folder.is_file() and folder.suffix != ".gguf":
        whose = f"; that is {folder.parent}" * (folder.parent / CONFIG).is_file()
        raise FileNotFoundError(f"{folder}: {expected}, got a file{whose}")
    if folder.suffix == ".gguf":
        raise FileNotFoundError(f"{folder}: {expected}; adapters as GGUF files are not read")
    model = "; this folder holds a model" * (folder / "config.json").is_file()
    raise FileNotFoundError(f"{folder}: no {CONFIG} there; {expected}{model}")


def is_mixture(folder: str | Path) -> bool:
    """Whether a folder is of several adapters (`models.mixture`), not of one."""
    return not (Path(folder) / CONFIG).is_file() and (Path(folder) / MIXTURE).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises ValueError for what no causal model is adapted by."""
    try:
        config = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type: expected CAUSAL_LM, got {config['task_type']}")
    name = config.get("base_model_name_or_path")
    if not isinstance(name, (str, type(None))):
        raise ValueError(f"{path}: base_model_name_or_path: expected text, got {name!r}")
    return config


def check_unset(path: Path, config: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse what asks for more than ``known`` does. Raises ValueError."""
    for key, value in config.items():
        if key not in known and value not in (None, False, [], {}, ""):
            raise ValueError(f"{path}: {key} = {value!r} is not supported; expected it unset")


def write_adapter(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Matrix],
    base: tuple[str, str],
) -> None:
    """Existing files are replaced whole. base: fingerprint, "" for one that is not known, and
    name."""
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    write_file(folder / TENSORS, save(plain, metadata={"format": "pt"}))
    if base[0]:
        write_json(folder / _BASE, {"name": base[1], "fingerprint": base[0]})
    else:
        (folder / _BASE).unlink(missing_ok=True)
    write_json(folder / CONFIG, dict(config))
    sync_folder(folder.parent)


def base_of_folder(folder: Path) -> tuple[str, str]:
    """(fingerprint, name) of the base model; a file that is not ours says nothing."""
    with contextlib.suppress(OSError, ValueError):
        base = json.loads((folder / _BASE).read_text("utf-8"))
        if isinstance(base, dict) and isinstance(base.get("fingerprint"), str):
            return str(base["fingerprint"]), str(base.get("name", ""))
    return "", ""


def read_tensors(path: Path) -> dict[str, Matrix]:
    from safetensors import SafetensorError, deserialize

    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle and is not read, save it as safetensors" * pickled
        raise FileNotFoundError(f"{path}: no such file{hint}")
    check_fetched(path)
    try:
        listed = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    # By name, because the library gives another order each time, and errors should not.
    ordered = sorted(listed, key=lambda item: item[0])
    return {name: _as_float32(path, name, entry) for name, entry in ordered}


def _as_float32(path: Path, name: str, entry: Mapping[str, Any]) -> Matrix:
    data, dtype = entry["data"], entry["dtype"]
    if dtype in ("F32", "F16"):
        values = np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32)
    elif dtype == "BF16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise ValueError(f"{path}: {name}: expected F32, F16 or BF16, got {dtype}")
    return values.reshape(entry["shape"])
