"""Rewards: one file each, all behind the protocol ``types.Reward``. Loads nothing until asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro.rewards.build import build_reward
    from alignpro.rewards.check import RewardError, reward_name, score_checked
    from alignpro.rewards.classifier import ClassifierReward
    from alignpro.rewards.combine import WeightedSum, score_components
    from alignpro.rewards.function import FunctionReward, from_callable
    from alignpro.rewards.house_rules import HouseRulesReward
    from alignpro.rewards.topic import TopicReward
    from alignpro.rewards.vader import VaderReward

__all__ = [
    "ClassifierReward",
    "FunctionReward",
    "HouseRulesReward",
    "RewardError",
    "TopicReward",
    "VaderReward",
    "WeightedSum",
    "build_reward",
    "from_callable",
    "reward_name",
    "score_checked",
    "score_components",
]

_HOMES = {
    "ClassifierReward": "classifier",
    "FunctionReward": "function",
    "HouseRulesReward": "house_rules",
    "RewardError": "check",
    "TopicReward": "topic",
    "VaderReward": "vader",
    "WeightedSum": "combine",
    "build_reward": "build",
    "from_callable": "function",
    "reward_name": "check",
    "score_checked": "check",
    "score_components": "combine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
