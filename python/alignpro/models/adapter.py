"""Adapters on disk, in PEFT's formats: LoRA here, and soft prompts.

Everything an adapter asks for is done, or refused by name; nothing is skipped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from alignpro.models.adapter_files import (
    CONFIG,
    MIXTURE,
    TENSORS,
    Matrix,
    adapter_folder,
    base_of_folder,
    check_unset,
    is_mixture,
    read_config,
    read_tensors,
    write_adapter,
)
from alignpro.models.soft_prompt import PEFT_TYPE as SOFT_PROMPT
from alignpro.models.soft_prompt import SoftPrompt, read_soft_prompt, soft_prompt_files

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
    base_fingerprint: str = ""  # of the base's files (models.fingerprint); "": not known

    @property
    def scale(self) -> float:
        """alpha / rank; alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732)."""
        return _scale(self.alpha, self.rank, self.rslora)


AdapterWeights: TypeAlias = LoraWeights | SoftPrompt


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def load_peft(
    folder: str | Path,
    lora_modules: Mapping[str, tuple[int, int]],
    base_table: Callable[[str], Matrix] | None = None,
) -> AdapterWeights:
    """Read an adapter that PEFT or `save_peft` wrote: LoRA, or a soft prompt (PROMPT_TUNING).

    Modules of several ranks and scales (rank_pattern, alpha_pattern, halves of a fused matrix) are
    given the largest rank, by zeros, and one scale, by factors on B: the same update.

    Args:
        folder: as for `adapter_folder`.
        lora_modules: the model's linears: module path -> (out_features, in_features).
        base_table: gives the model's "embed_tokens" or "lm_head", [vocab, hidden]; a file that
            holds a copy of one, as PEFT's save_embedding_layers writes, is then read.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: an option that is not supported, an unknown module, a wrong shape or rank, a
            missing half, or scales of 0 alone; the message names file and module. A mixture.
    """
    folder = adapter_folder(folder)
    if is_mixture(folder):
        raise ValueError(
            f"{folder}: a mixture of adapters ({MIXTURE}), which text is drawn with and nothing is "
            "trained from; expected the folder of one PEFT adapter"
        )
    config = read_config(folder / CONFIG)
    kind = config.get("peft_type")
    if kind == SOFT_PROMPT:
        return read_soft_prompt(folder, config)
    if kind != "LORA":
        reason = _OTHER_PROMPTS.get(str(kind), "")
        raise ValueError(
            f"{folder / CONFIG}: peft_type: expected LORA or {SOFT_PROMPT}, got {kind}{reason}"
        )
    return _read_lora(folder, config, lora_modules, base_table)


def _read_lora(
    folder: Path,
    config: Mapping[str, Any],
    lora_modules: Mapping[str, tuple[int, int]],
    base_table: Callable[[str], Matrix] | None,
) -> LoraWeights:
    _check_config(folder / CONFIG, config)
    path = folder / TENSORS
    found: dict[str, _Update] = {}
    parts: dict[str, dict[str, _Update]] = {}
    for module, (a, b) in _read_pairs(path, base_table).items():
        rank = _of_pattern(config, "rank_pattern", module, config["r"])
        alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scale = _scale(float(alpha), rank, config.get("use_rslora") is True)
        update = _Update(rank, scale, a, b)
        whole = _fused(module)
        if module in lora_modules:
            found[module] = update.checked(path, module, *lora_modules[module])
        elif whole in lora_modules:
            update.checked(path, module, b.shape[0], lora_modules[whole][1])
            parts.setdefault(whole, {})[module.rpartition(".")[2]] = update
        else:
            raise ValueError(
                f"{path}: the model has no module {module}; it has {_examples(lora_modules)}"
            )
    for whole, halves in parts.items():
        if whole in found:
            raise ValueError(f"{path}: {whole} has matrices as a whole and by its parts")
        found[whole] = _stacked(path, whole, halves, lora_modules[whole][0])
    if not found:
        raise ValueError(f"{path}: holds no LoRA matrices")
    _check_targets(path, config, found, lora_modules)
    rank, alpha, rslora = _common(config, found)
    if alpha == 0:
        key = "alpha_pattern" if config["lora_alpha"] else "lora_alpha"
        raise ValueError(
            f"{folder / CONFIG}: {key} is 0: the adapter adds nothing and cannot be "
            "trained; expected another number"
        )
    scale = _scale(alpha, rank, rslora)
    return LoraWeights(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        matrices={m: found[m].padded(rank, scale) for m in lora_modules if m in found},
        base_model_name=config.get("base_model_name_or_path") or "",
        base_fingerprint=base_of_folder(folder)[0],
    )


def require_lora(weights: AdapterWeights, what: str) -> LoraWeights:
    """For what is made of matrices. Raises ValueError for a soft prompt."""
    if not isinstance(weights, LoraWeights):
        raise ValueError(f"{what}: expected LoRA matrices, got a soft prompt")
    return weights


def save_peft(folder: str | Path, weights: AdapterWeights) -> None:
    """Write an adapter that PEFT loads. Existing files are replaced whole.

    Raises:
        ValueError: matrices that do not have the stated rank, rows that are none, or what is no
            adapter, as a mixture.
    """
    if isinstance(weights, SoftPrompt):
        config, tensors = soft_prompt_files(weights)
    elif isinstance(weights, LoraWeights):
        config, tensors = _lora_files(weights)
    else:
        expected = "adapter: expected LoraWeights or a SoftPrompt"
        raise ValueError(f"{expected}, got {type(weights).__name__}")
    write_adapter(folder, config, tensors, (weights.base_fingerprint, weights.base_model_name))


def _lora_files(weights: LoraWeights) -> tuple[dict[str, Any], dict[str, Matrix]]:
    tensors: dict[str, Matrix] = {}
    for module, (a, b) in weights.matrices.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != weights.rank or b.shape[1] != weights.rank:
            raise ValueError(
                f"{module}: expected A [{weights.rank}, in] and B [out, {weights.rank}], got "
                f"{a.shape} and {b.shape}"
            )
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
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
    return config, tensors


# --- modules of several ranks and scales ---


@dataclass(frozen=True)
class _Update:
    """What one module's matrices add: scale * B (A x)."""

    rank: int
    scale: float
    a: Matrix  # [rank, in]
    b: Matrix  # [out, rank]

    def checked(self, path: Path, module: str, outputs: int, inputs: int) -> _Update:
        expected = {"A": (self.rank, inputs), "B": (outputs, self.rank)}
        for half, tensor in (("A", self.a), ("B", self.b)):
            if tensor.shape != expected[half]:
                raise ValueError(
                    f"{path}: {module}: expected lora_{half} of shape {expected[half]} "
                    f"(rank {self.rank}), got {tensor.shape}"
                )
            if not np.isfinite(tensor).all():
                raise ValueError(f"{path}: {module}: lora_{half} holds NaN or infinity")
        return self

    def padded(self, rank: int, scale: float) -> tuple[Matrix, Matrix]:
        more = rank - self.rank
        factor = np.float32(self.scale / scale)
        b = self.b if factor == 1 else self.b * factor
        return np.pad(self.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


_FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}


def _fused(module: str) -> str:
    """The fused matrix of which a module of another family's name is a part; "" for none."""
    for whole, parts in _FUSED.items():
        block, _, name = whole.rpartition(".")
        for part in parts:
            if module.endswith(f".{block}.{part}"):
                return module.removesuffix(part) + name
    return ""


def _stacked(path: Path, whole: str, parts: Mapping[str, _Update], outputs: int) -> _Update:
    """The parts' updates as one: ranks side by side, each B in its part's output rows."""
    rows = {name: update.b.shape[0] for name, update in parts.items()}
    if "gate_up_proj" in whole:
        sizes = {"gate_proj": outputs // 2, "up_proj": outputs // 2}
    else:  # keys and values are alike, so either says what is left for queries
        queries = rows.get("q_proj", outputs - 2 * rows.get("k_proj", rows.get("v_proj", 0)))
        values = (outputs - queries) // 2
        sizes = {"q_proj": queries, "k_proj": values, "v_proj": values}
    if min(sizes.values()) <= 0 or any(rows[name] != sizes[name] for name in parts):
        got = ", ".join(f"{name} with {size}" for name, size in rows.items())
        raise ValueError(
            f"{path}: {whole} is fused, of {outputs} outputs, into which these do not fit: {got}"
        )
    begins = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    rank = sum(update.rank for update in parts.values())
    scale = next((u.scale for u in parts.values() if u.scale), 0.0)
    b = np.zeros((outputs, rank), np.float32)
    at = 0
    for name, update in parts.items():
        factor = np.float32(update.scale / scale if scale else 0.0)
        b[begins[name] : begins[name] + rows[name], at : at + update.rank] = update.b * factor
        at += update.rank
    return _Update(rank, scale, np.concatenate([u.a for u in parts.values()]), b)


def _common(config: Mapping[str, Any], found: Mapping[str, _Update]) -> tuple[int, float, bool]:
    """(rank, alpha, rslora) for all modules: the file's own where they agree; else the largest rank
    and the alpha that gives a scale there is."""
    rank = max(update.rank for update in found.values())
    rslora = config.get("use_rslora") is True
    alpha = float(config["lora_alpha"])
    scales = {update.scale for update in found.values()}
    if scales == {_scale(alpha, rank, rslora)}:
        return rank, alpha, rslora
    scale = next((u.scale for u in found.values() if u.scale), 0.0)
    return rank, scale * rank / _scale(rank, rank, rslora), rslora


def _of_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Of the first pattern that matches names at the path's end, as PEFT's get_pattern_key."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_targets(
    path: Path,
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    lora_modules: Mapping[str, Any],
) -> None:
    """Names that the model lacks are passed over, as PEFT does: lists are written for many models.
    A module that the model has and the file does not is a damaged file."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    # PEFT's word for all but the head, which is no module here.
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    for module in lora_modules:
        wanted = every or _is_named(module, targets)
        layer = re.search(r"\.layers\.(\d+)\.", module)
        if layers is not None and (layer is None or int(layer[1]) not in layers):
            continue
        excluded = _is_named(module, config.get("exclude_modules"))
        if wanted and module not in found and not excluded:
            raise ValueError(
                f"{path}: {module} is in target_modules of {CONFIG}, but the file has no matrices "
                "for it"
            )


def _is_named(module: str, names: Any) -> bool:
    """As PEFT reads target_modules and exclude_modules: an expression for the whole path, or names
    at its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends_in(module, name) for name in names or ())


def _ends_in(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


# --- the configuration ---

# Options that change neither what is in the file nor what is computed from it.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
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
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# The named initialisations that leave the base weights alone; after others, as PiSSA and OLoRA, the
# adapter needs the changed ones.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")


# PEFT's other prompts, and what stands in the way of each.
_OTHER_PROMPTS = {
    "P_TUNING": ": its rows come out of an encoder; train with PROMPT_TUNING",
    "PREFIX_TUNING": ": it holds keys and values of every layer; train with PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING": ": its rows depend on a task; train with PROMPT_TUNING",
    "CPT": ": its rows stand among examples of its own; train with PROMPT_TUNING",
}


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"{path}: bias: expected none, got {config['bias']}; it is not supported")
    check_unset(path, config, _HARMLESS)
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower() not in _KEEPS_BASE:
        raise ValueError(
            f"{path}: init_lora_weights = {initial!r} changes the base weights and is not "
            "supported; convert the adapter to plain LoRA with PEFT when saving it"
        )
    rslora = config.get("use_rslora")
    if not isinstance(rslora, (bool, type(None))):
        raise ValueError(f"{path}: use_rslora: expected true or false, got {rslora!r}")
    for key in ("target_modules", "exclude_modules"):
        _check_names(f"{path}: {key}", config.get(key))
    layers = config.get("layers_to_transform")
    if not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers or 0])):
        raise ValueError(f"{path}: layers_to_transform: expected layer numbers, got {layers!r}")
    _check_rank(f"{path}: r", config.get("r"))
    _check_alpha(f"{path}: lora_alpha", config.get("lora_alpha"))
    checks = {"rank_pattern": _check_rank, "alpha_pattern": _check_alpha}
    for key, check in checks.items():
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key}: expected an object, got {type(patterns).__name__}")
        for pattern, value in patterns.items():
            check(f"{path}: {key}: {pattern}", value)
            _check_pattern(f"{path}: {key}", pattern)


def _check_names(what: str, names: Any) -> None:
    if isinstance(names, str):
        _check_pattern(what, names)
    elif names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{what}: expected names of modules, got {names!r}")


def _check_pattern(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern}: no pattern: {error}") from None


def _check_rank(what: str, rank: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{what}: expected a rank of 1 or more, got {rank!r}")


def _check_alpha(what: str, alpha: Any) -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"{what}: expected a number, got {alpha!r}")


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


def _read_pairs(
    path: Path, base_table: Callable[[str], Matrix] | None
) -> dict[str, tuple[Matrix, Matrix]]:
    """Module path -> (A, B)."""
    halves: dict[str, dict[str, Matrix]] = {}
    for key, tensor in read_tensors(path).items():
        table = re.search(r"(embed_tokens|lm_head)\.lora_", key)
        if table is not None:
            raise ValueError(
                f"{path}: {key}: LoRA of {table[1]} is not supported; expected modules of the "
                "layers alone"
            )
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is not None:
            halves.setdefault(match[1], {})[match[2]] = tensor
            continue
        whole = re.search(r"(embed_tokens|lm_head)(?:\.base_layer)?\.weight$", key)
        if whole is not None:
            if base_table is not None and np.array_equal(base_table(whole[1]), tensor):
                continue
            raise ValueError(
                f"{path}: holds a {whole[1]} of its own ({key}), which is not supported; save the "
                "adapter without it (save_embedding_layers=False), or merge it into its base"
            )
        raise ValueError(
            f"{path}: unexpected tensor {key}; expected {_PREFIX}MODULE.lora_A.weight and "
            "lora_B.weight alone"
        )
    for module, found in halves.items():
        if len(found) != 2:
            raise ValueError(f"{path}: {module}: lora_{'B' if 'A' in found else 'A'} is missing")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}
