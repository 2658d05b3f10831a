"""LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

Everything an adapter asks for is done, or refused by name; nothing is skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpro.files import write_file, write_json

Matrix = NDArray[np.float32]

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(eq=False)
class LoraWeights:
    """The matrices of one adapter: y = W x + scale * B (A x) (arXiv 2106.09685).

    Compared by identity, and not to be edited once a model has seen it: the engine keeps its copy.
    """

    rank: int
    alpha: float
    rslora: bool
    matrices: dict[str, tuple[Matrix, Matrix]]  # module path -> (A [rank, in], B [out, rank])
    base_model_name: str = ""

    @property
    def scale(self) -> float:
        """alpha / rank; alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def load_peft(folder: str | Path, lora_modules: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """Read an adapter that PEFT or `save_peft` wrote.

    Args:
        lora_modules: the model's linears: module path -> (out_features, in_features).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: an option that is not supported, an unknown module, a wrong shape or rank, a
            missing half; the message names file and module.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    path = folder / _TENSORS
    tensors = _read_tensors(path)
    rank = config["r"]
    halves: dict[str, dict[str, Matrix]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise ValueError(
                f"{path}: unexpected tensor {key}; expected {_PREFIX}MODULE.lora_A.weight and "
                "lora_B.weight alone"
            )
        module, half = match.groups()
        if module not in lora_modules:
            raise ValueError(
                f"{path}: the model has no module {module}; it has {_examples(lora_modules)}"
            )
        out_features, in_features = lora_modules[module]
        expected = (rank, in_features) if half == "A" else (out_features, rank)
        if tensor.shape != expected:
            raise ValueError(
                f"{path}: {module}: expected lora_{half} of shape {expected} (rank {rank}), got "
                f"{tensor.shape}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {module}: lora_{half} holds NaN or infinity")
        halves.setdefault(module, {})[half] = tensor
    if not halves:
        raise ValueError(f"{path}: holds no LoRA matrices")
    for module, found in halves.items():
        if len(found) != 2:
            raise ValueError(f"{path}: {module}: lora_{'B' if 'A' in found else 'A'} is missing")
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{module}".endswith(f".{target}") for module in halves):
            raise ValueError(
                f"{path}: {target} is in target_modules of {_CONFIG}, but the file has no matrices "
                "for it"
            )
    return LoraWeights(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        rslora=config.get("use_rslora") is True,
        matrices={m: (halves[m]["A"], halves[m]["B"]) for m in lora_modules if m in halves},
        base_model_name=config.get("base_model_name_or_path") or "",
    )


def save_peft(folder: str | Path, weights: LoraWeights) -> None:
    """Write an adapter that PEFT loads. Existing files are replaced whole.

    Raises:
        ValueError: matrices that do not have the stated rank.
    """
    from safetensors.numpy import save

    tensors: dict[str, Matrix] = {}
    for module, (a, b) in weights.matrices.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != weights.rank or b.shape[1] != weights.rank:
            raise ValueError(
                f"{module}: expected A [{weights.rank}, in] and B [out, {weights.rank}], got "
                f"{a.shape} and {b.shape}"
            )
        for half, matrix in (("A", a), ("B", b)):
            tensors[f"{_PREFIX}{module}.lora_{half}.weight"] = np.ascontiguousarray(
                matrix, np.float32
            )
    targets, layers = _targets(weights.matrices)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": weights.base_model_name,
        "r": weights.rank,
        "lora_alpha": int(weights.alpha) if float(weights.alpha).is_integer() else weights.alpha,
        "lora_dropout": 0.0,
        "use_rslora": weights.rslora,
        "target_modules": targets,
        "layers_to_transform": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _TENSORS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / _CONFIG, config)


# --- the configuration ---

# Options that change neither what is in the file nor what is computed from it.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# These initialisations also change the base weights, which the adapter then needs.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a PEFT LoRA adapter")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected LORA, got {config.get('peft_type')}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type: expected CAUSAL_LM, got {config['task_type']}")
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"{path}: bias: expected none, got {config['bias']}; it is not supported")
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, [], {}, ""):
            raise ValueError(f"{path}: {key} = {value!r} is not supported; expected it unset")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights = {initial!r} changes the base weights and is not "
            "supported; convert the adapter to plain LoRA with PEFT when saving it"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{path}: r: expected a rank of 1 or more, got {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha: expected a number, got {alpha!r}")
    return config


def _targets(modules: Mapping[str, Any]) -> tuple[list[str], list[int] | None]:
    """(target_modules, layers_to_transform) by which PEFT finds exactly these modules: the names'
    last parts and the layers if every layer has the same; else every path in full."""
    by_layer: dict[int, set[str]] = {}
    for module in modules:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", module)
        if match is None:
            return sorted(modules), None
        by_layer.setdefault(int(match[1]), set()).add(match[2])
    kinds = list(by_layer.values())
    if not kinds or any(kind != kinds[0] for kind in kinds):
        return sorted(modules), None
    return sorted(kinds[0]), sorted(by_layer)


def _examples(modules: Mapping[str, Any]) -> str:
    names = list(modules)
    return f"{names[0]} ... {names[-1]}" if len(names) > 1 else ", ".join(names) or "none"


# --- tensors ---


def _read_tensors(path: Path) -> dict[str, Matrix]:
    from safetensors import SafetensorError, deserialize

    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle and is not read, save it as safetensors" * pickled
        raise FileNotFoundError(f"{path}: no such file{hint}")
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
