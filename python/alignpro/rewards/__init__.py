"""Rewards: one file each, all behind the protocol ``types.Reward``. Loads nothing until asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro.rewards.build import build_reward as build_reward
    from alignpro.rewards.check import RewardError as RewardError
    from alignpro.rewards.check import reward_name as reward_name
    from alignpro.rewards.check import score_checked as score_checked
    from alignpro.rewards.classifier import ClassifierReward as ClassifierReward
    from alignpro.rewards.combine import WeightedSum as WeightedSum
    from alignpro.rewards.combine import score_components as score_components
    from alignpro.rewards.confidence import ConfidenceReward as ConfidenceReward
    from alignpro.rewards.forbidden import ForbiddenReward as ForbiddenReward
    from alignpro.rewards.function import FunctionReward as FunctionReward
    from alignpro.rewards.function import from_callable as from_callable
    from alignpro.rewards.grounding import GroundingReward as GroundingReward
    from alignpro.rewards.house_rules import HouseRulesReward as HouseRulesReward
    from alignpro.rewards.learned import LearnedReward as LearnedReward
    from alignpro.rewards.scenes import ChairReward as ChairReward
    from alignpro.rewards.schema import SchemaReward as SchemaReward
    from alignpro.rewards.topic import TopicReward as TopicReward
    from alignpro.rewards.vader import VaderReward as VaderReward

_HOMES = {
    "ChairReward": "scenes",
    "ClassifierReward": "classifier",
    "ConfidenceReward": "confidence",
    "ForbiddenReward": "forbidden",
    "FunctionReward": "function",
    "GroundingReward": "grounding",
    "HouseRulesReward": "house_rules",
    "LearnedReward": "learned",
    "RewardError": "check",
    "SchemaReward": "schema",
    "TopicReward": "topic",
    "VaderReward": "vader",
    "WeightedSum": "combine",
    "build_reward": "build",
    "from_callable": "function",
    "reward_name": "check",
    "score_checked": "check",
    "score_components": "combine",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
