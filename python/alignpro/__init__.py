"""Train a small prompter in front of a frozen language model, on a compiled engine.

Every public name is loaded when it is first used: ``import alignpro`` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro.config import (
        BoundConfig,
        EvalConfig,
        HeadroomConfig,
        LoraConfig,
        ModelConfig,
        Prompting,
        QuickstartConfig,
        SftConfig,
        TrainConfig,
    )
    from alignpro.models.adapter import LoraWeights, load_peft, save_peft
    from alignpro.models.endpoint import EndpointModel
    from alignpro.models.native_model import NativeModel, load_model
    from alignpro.models.resolve import resolve_model
    from alignpro.models.tokenizer import Tokenizer
    from alignpro.native import ModelFileError, NumericError, UnavailableError
    from alignpro.pipeline import Pipeline
    from alignpro.rewards.build import build_reward
    from alignpro.rewards.check import RewardError
    from alignpro.train.callbacks import TrainCallback
    from alignpro.train.trainer import Trainer
    from alignpro.types import (
        Chat,
        Completion,
        Message,
        Response,
        Reward,
        Rewrite,
        Rollout,
        SamplingParams,
    )

    __version__: str

__all__ = [
    "BoundConfig",
    "Chat",
    "Completion",
    "EndpointModel",
    "EvalConfig",
    "HeadroomConfig",
    "LoraConfig",
    "LoraWeights",
    "Message",
    "ModelConfig",
    "ModelFileError",
    "NativeModel",
    "NumericError",
    "Pipeline",
    "Prompting",
    "QuickstartConfig",
    "Response",
    "Reward",
    "RewardError",
    "Rewrite",
    "Rollout",
    "SamplingParams",
    "SftConfig",
    "Tokenizer",
    "TrainCallback",
    "TrainConfig",
    "Trainer",
    "UnavailableError",
    "__version__",
    "build_reward",
    "load_model",
    "load_peft",
    "resolve_model",
    "save_peft",
]

_HOMES = {
    "BoundConfig": "config",
    "Chat": "types",
    "Completion": "types",
    "EndpointModel": "models.endpoint",
    "EvalConfig": "config",
    "HeadroomConfig": "config",
    "LoraConfig": "config",
    "LoraWeights": "models.adapter",
    "Message": "types",
    "ModelConfig": "config",
    "ModelFileError": "native",
    "NativeModel": "models.native_model",
    "NumericError": "native",
    "Pipeline": "pipeline",
    "Prompting": "config",
    "QuickstartConfig": "config",
    "Response": "types",
    "Reward": "types",
    "RewardError": "rewards.check",
    "Rewrite": "types",
    "Rollout": "types",
    "SamplingParams": "types",
    "SftConfig": "config",
    "Tokenizer": "models.tokenizer",
    "TrainCallback": "train.callbacks",
    "TrainConfig": "config",
    "Trainer": "train.trainer",
    "UnavailableError": "native",
    "build_reward": "rewards.build",
    "load_model": "models.native_model",
    "load_peft": "models.adapter",
    "resolve_model": "models.resolve",
    "save_peft": "models.adapter",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        value: Any = metadata.version("alignpro")
    elif name == "ops":  # a package by its own name; it imports torch
        value = importlib.import_module("alignpro.ops")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"alignpro.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'alignpro' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
