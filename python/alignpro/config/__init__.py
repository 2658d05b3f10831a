"""Every option of every stage, as dataclasses with commented defaults. Standard library only.

A configuration is read from a mapping (`from_mapping`), from a YAML file (`load_yaml`, which needs
PyYAML) and adjusted by overrides ("train.learning_rate=1e-4"). Whatever the way in, an unknown key,
a value of the wrong type and a value out of range are a `ValueError` of one line naming the field.
"""

from __future__ import annotations

from alignpro.config.closed_form import ClosedFormConfig
from alignpro.config.evaluate import (
    ARMS,
    EvalConfig,
    JudgeConfig,
    Labelled,
    OptimumConfig,
    StaticSearch,
    read_requirement,
)
from alignpro.config.fields import from_mapping
from alignpro.config.held_out import HeldOutConfig
from alignpro.config.model import DEFAULT_MODEL, ModelConfig, target_of
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
    "ARMS",
    "DEFAULT_MODEL",
    "RESPONSE",
    "REWRITE",
    "BoundConfig",
    "ClosedFormConfig",
    "EvalConfig",
    "HeadroomConfig",
    "HeldOutConfig",
    "JudgeConfig",
    "Labelled",
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
    "check_sampling",
    "from_mapping",
    "load_yaml",
    "read_requirement",
    "target_of",
    "to_mapping",
]
