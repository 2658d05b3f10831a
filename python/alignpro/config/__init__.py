"""Every option of every stage, as dataclasses with commented defaults. Standard library only.

A configuration is read from a mapping (`from_mapping`), from a YAML file (`load_yaml`, which needs
PyYAML) and adjusted by overrides ("train.learning_rate=1e-4"). Whatever the way in, an unknown key,
a value of the wrong type and a value out of range are a `ValueError` of one line naming the field.
"""

from __future__ import annotations

from alignpro.config.anchor import AnchorConfig as AnchorConfig
from alignpro.config.data import DataConfig as DataConfig
from alignpro.config.data import InstructionsConfig as InstructionsConfig
from alignpro.config.data import OnTooLong as OnTooLong
from alignpro.config.data import PairsConfig as PairsConfig
from alignpro.config.data import PreferencesConfig as PreferencesConfig
from alignpro.config.data import Source as Source
from alignpro.config.endpoint import Budget as Budget
from alignpro.config.endpoint import ClientConfig as ClientConfig
from alignpro.config.evaluate import ARMS as ARMS
from alignpro.config.evaluate import EvalConfig as EvalConfig
from alignpro.config.evaluate import JudgeConfig as JudgeConfig
from alignpro.config.evaluate import Labelled as Labelled
from alignpro.config.evaluate import OptimumConfig as OptimumConfig
from alignpro.config.evaluate import SafetyConfig as SafetyConfig
from alignpro.config.evaluate import StaticSearch as StaticSearch
from alignpro.config.evaluate import read_requirement as read_requirement
from alignpro.config.extract import ExtractConfig as ExtractConfig
from alignpro.config.extract import SchemaConfig as SchemaConfig
from alignpro.config.fields import from_mapping as from_mapping
from alignpro.config.fields import unchecked as unchecked
from alignpro.config.guards import GuardConfig as GuardConfig
from alignpro.config.guards import GuardPenaltyConfig as GuardPenaltyConfig
from alignpro.config.held_out import HeldOutConfig as HeldOutConfig
from alignpro.config.mix import MixConfig as MixConfig
from alignpro.config.model import DEFAULT_MODEL as DEFAULT_MODEL
from alignpro.config.model import HOW_IT_RUNS as HOW_IT_RUNS
from alignpro.config.model import ModelConfig as ModelConfig
from alignpro.config.model import check_local as check_local
from alignpro.config.model import target_of as target_of
from alignpro.config.prefer import PreferConfig as PreferConfig
from alignpro.config.prefer import RewardFitConfig as RewardFitConfig
from alignpro.config.prompting import RESPONSE as RESPONSE
from alignpro.config.prompting import REWRITE as REWRITE
from alignpro.config.prompting import FitConfig as FitConfig
from alignpro.config.prompting import LoraConfig as LoraConfig
from alignpro.config.prompting import PairsFitConfig as PairsFitConfig
from alignpro.config.prompting import Prompting as Prompting
from alignpro.config.prompting import SoftPromptConfig as SoftPromptConfig
from alignpro.config.prompting import StageConfig as StageConfig
from alignpro.config.prompting import check_sampling as check_sampling
from alignpro.config.quickstart import QUICKSTART as QUICKSTART
from alignpro.config.quickstart import QuickstartConfig as QuickstartConfig
from alignpro.config.read import apply_overrides as apply_overrides
from alignpro.config.read import check_config as check_config
from alignpro.config.read import differing as differing
from alignpro.config.read import load_yaml as load_yaml
from alignpro.config.read import to_mapping as to_mapping
from alignpro.config.self_improve import SelfImproveConfig as SelfImproveConfig
from alignpro.config.serve import ServeConfig as ServeConfig
from alignpro.config.sft import SftConfig as SftConfig
from alignpro.config.theory import BoundConfig as BoundConfig
from alignpro.config.theory import HeadroomConfig as HeadroomConfig
from alignpro.config.train import ClosedFormConfig as ClosedFormConfig
from alignpro.config.train import PpoConfig as PpoConfig
from alignpro.config.train import TrainConfig as TrainConfig
