"""Every option of every stage, as dataclasses with commented defaults. Standard library only.

A configuration is read from a mapping (`from_mapping`), from a YAML file (`load_yaml`, which needs
PyYAML) and adjusted by overrides ("train.learning_rate=1e-4"). Whatever the way in, an unknown key,
a value of the wrong type and a value out of range are a `ValueError` of one line naming the field.
"""

from __future__ import annotations

from alignpro.config.closed_form import ClosedFormConfig
from alignpro.config.endpoint import Budget, ClientConfig
from alignpro.config.evaluate import EvalConfig, JudgeConfig, OptimumConfig, StaticSearch
from alignpro.config.fields import from_mapping
from alignpro.config.model import DEFAULT_MODEL, ModelConfig, check_local, target_of
from alignpro.config.ppo import PpoConfig
from alignpro.config.prompting import (
    RESPONSE,
    REWRITE,
    LoraConfig,
    Prompting,
    StageConfig,
    check_sampling,
)
from alignpro.config.quickstart import QuickstartConfig
from alignpro.config.read import apply_overrides, load_yaml, to_mapping
from alignpro.config.sft import SftConfig
from alignpro.config.theory import BoundConfig, HeadroomConfig
from alignpro.config.train import TrainConfig

__all__ = [
    "DEFAULT_MODEL",
    "RESPONSE",
    "REWRITE",
    "BoundConfig",
    "Budget",
    "ClientConfig",
    "ClosedFormConfig",
    "EvalConfig",
    "HeadroomConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimumConfig",
    "PpoConfig",
    "Prompting",
    "QuickstartConfig",
    "SftConfig",
    "StageConfig",
    "StaticSearch",
    "TrainConfig",
    "apply_overrides",
    "check_local",
    "check_sampling",
    "from_mapping",
    "load_yaml",
    "target_of",
    "to_mapping",
]
