"""Checks that the fields of several stages share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from alignpro.config.evaluate import EvalConfig
    from alignpro.config.sft import SftConfig
    from alignpro.config.theory import BoundConfig, HeadroomConfig
    from alignpro.config.train import TrainConfig

Bytes = Annotated[int, "bytes"]  # read from text with a unit as well: "1.5GB", "800MiB"


def check_optimizer(config: SftConfig | TrainConfig) -> None:
    """What AdamW, the schedule and the seed may be."""
    require("learning_rate", config.learning_rate, config.learning_rate > 0, "above 0")
    require("warmup_steps", config.warmup_steps, config.warmup_steps >= 0, "0 or more")
    require("weight_decay", config.weight_decay, config.weight_decay >= 0, "0 or more")
    require("max_grad_norm", config.max_grad_norm, config.max_grad_norm > 0, "above 0")
    require("seed", config.seed, 0 <= config.seed < 2**64, "between 0 and 2**64 - 1")
    if config.threads is not None:
        require("threads", config.threads, config.threads >= 1, "at least 1")


# What a model may compute with, by device, the device's own first; and how it may multiply.
COMPUTE = {"cpu": ("float32", "int8"), "cuda": ("bfloat16", "float32")}
MODES = {"cpu": ("strict",), "cuda": ("strict", "fast")}


def check_target(config: TrainConfig | EvalConfig | HeadroomConfig | BoundConfig) -> None:
    """What the target may compute with where it is, and how."""
    _check_model("target", config.target_device, config.target_compute, config.target_mode)


def check_prompter(
    config: SftConfig | TrainConfig | EvalConfig | HeadroomConfig | BoundConfig,
) -> None:
    """What the prompter may compute with where it is, and how; not what has no gradients."""
    _check_model(
        "prompter",
        config.prompter_device,
        config.prompter_compute,
        config.prompter_mode,
        without=("int8",),
    )


def _check_model(
    role: str, device: str, compute: str, mode: str, without: tuple[str, ...] = ()
) -> None:
    computes = [name for name in COMPUTE[device] if name not in without]
    for name, value, allowed in (("compute", compute, computes), ("mode", mode, MODES[device])):
        expected = f"{' or '.join(allowed)} with {role}_device {device}"
        require(f"{role}_{name}", value, value in allowed, expected)


def check_micro_batches(config: SftConfig | TrainConfig) -> None:
    """What bounds the memory of a forward and backward."""
    require("memory_limit", config.memory_limit, config.memory_limit >= 1, "1 byte or more")
    size = config.micro_batch_size
    require("micro_batch_size", size, size is None or size >= 1, "1 or more")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """A ValueError that names the field, unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def default_of(f: dataclasses.Field[Any]) -> object:
    """A fresh default of a dataclass field."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default
