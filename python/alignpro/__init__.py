"""Train a small prompter in front of a frozen language model, on a compiled engine.

Every public name is loaded when it is first used: ``import alignpro`` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro.config import BoundConfig as BoundConfig
    from alignpro.config import DataConfig as DataConfig
    from alignpro.config import EvalConfig as EvalConfig
    from alignpro.config import GuardConfig as GuardConfig
    from alignpro.config import GuardPenaltyConfig as GuardPenaltyConfig
    from alignpro.config import HeadroomConfig as HeadroomConfig
    from alignpro.config import LoraConfig as LoraConfig
    from alignpro.config import ModelConfig as ModelConfig
    from alignpro.config import PreferConfig as PreferConfig
    from alignpro.config import Prompting as Prompting
    from alignpro.config import QuickstartConfig as QuickstartConfig
    from alignpro.config import RewardFitConfig as RewardFitConfig
    from alignpro.config import SelfImproveConfig as SelfImproveConfig
    from alignpro.config import SftConfig as SftConfig
    from alignpro.config import SoftPromptConfig as SoftPromptConfig
    from alignpro.config import TrainConfig as TrainConfig
    from alignpro.config import load_yaml as load_yaml
    from alignpro.evaluate.headroom import run_headroom as run_headroom
    from alignpro.evaluate.run import run_evaluate as run_evaluate
    from alignpro.models.adapter import LoraWeights as LoraWeights
    from alignpro.models.adapter import load_peft as load_peft
    from alignpro.models.adapter import save_peft as save_peft
    from alignpro.models.endpoint import EndpointModel as EndpointModel
    from alignpro.models.mixture import Mixture as Mixture
    from alignpro.models.native_model import NativeModel as NativeModel
    from alignpro.models.native_model import load_model as load_model
    from alignpro.models.resolve import resolve_model as resolve_model
    from alignpro.models.soft_prompt import SoftPrompt as SoftPrompt
    from alignpro.models.tokenizer import Tokenizer as Tokenizer
    from alignpro.native import ModelFileError as ModelFileError
    from alignpro.native import NumericError as NumericError
    from alignpro.native import UnavailableError as UnavailableError
    from alignpro.pipeline import Pipeline as Pipeline
    from alignpro.prompter import Prompter as Prompter
    from alignpro.rewards.build import build_reward as build_reward
    from alignpro.rewards.check import RewardError as RewardError
    from alignpro.rewards.function import from_callable as from_callable
    from alignpro.rewriting import Rewritten as Rewritten
    from alignpro.train.callbacks import TrainCallback as TrainCallback
    from alignpro.train.policy import LoraPolicy as LoraPolicy
    from alignpro.train.reward_fit import run_reward_fit as run_reward_fit
    from alignpro.train.run import make_trainer as make_trainer
    from alignpro.train.run import run_prefer as run_prefer
    from alignpro.train.run import run_sft as run_sft
    from alignpro.train.run import run_train as run_train
    from alignpro.train.self_improve import run_self_improve as run_self_improve
    from alignpro.train.soft_prompt import SoftPromptPolicy as SoftPromptPolicy
    from alignpro.train.trainer import Trainer as Trainer
    from alignpro.types import Chat as Chat
    from alignpro.types import Completion as Completion
    from alignpro.types import Conversation as Conversation
    from alignpro.types import Message as Message
    from alignpro.types import Response as Response
    from alignpro.types import Reward as Reward
    from alignpro.types import Rewrite as Rewrite
    from alignpro.types import Rollout as Rollout
    from alignpro.types import SamplingParams as SamplingParams

    __version__: str

_HOMES = {
    "BoundConfig": "config",
    "Chat": "types",
    "Completion": "types",
    "Conversation": "types",
    "DataConfig": "config",
    "EndpointModel": "models.endpoint",
    "EvalConfig": "config",
    "GuardConfig": "config",
    "GuardPenaltyConfig": "config",
    "HeadroomConfig": "config",
    "LoraConfig": "config",
    "LoraPolicy": "train.policy",
    "LoraWeights": "models.adapter",
    "Message": "types",
    "Mixture": "models.mixture",
    "ModelConfig": "config",
    "ModelFileError": "native",
    "NativeModel": "models.native_model",
    "NumericError": "native",
    "Pipeline": "pipeline",
    "PreferConfig": "config",
    "Prompter": "prompter",
    "Prompting": "config",
    "QuickstartConfig": "config",
    "Response": "types",
    "Reward": "types",
    "RewardError": "rewards.check",
    "RewardFitConfig": "config",
    "Rewrite": "types",
    "Rewritten": "rewriting",
    "Rollout": "types",
    "SamplingParams": "types",
    "SelfImproveConfig": "config",
    "SftConfig": "config",
    "SoftPrompt": "models.soft_prompt",
    "SoftPromptConfig": "config",
    "SoftPromptPolicy": "train.soft_prompt",
    "Tokenizer": "models.tokenizer",
    "TrainCallback": "train.callbacks",
    "TrainConfig": "config",
    "Trainer": "train.trainer",
    "UnavailableError": "native",
    "build_reward": "rewards.build",
    "from_callable": "rewards.function",
    "load_model": "models.native_model",
    "load_peft": "models.adapter",
    "load_yaml": "config",
    "make_trainer": "train.run",
    "resolve_model": "models.resolve",
    "run_evaluate": "evaluate.run",
    "run_headroom": "evaluate.headroom",
    "run_prefer": "train.run",
    "run_reward_fit": "train.reward_fit",
    "run_self_improve": "train.self_improve",
    "run_sft": "train.run",
    "run_train": "train.run",
    "save_peft": "models.adapter",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            value: Any = metadata.version("alignpro")
        except metadata.PackageNotFoundError:  # a checkout on the path
            value = "0+source"
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
