"""Every stage in one configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpro.config.evaluate import EvalConfig
from alignpro.config.fields import (
    Date,
    Place,
    RewardName,
    Seed,
    Threads,
    checked,
    default_of,
    only_default,
    require,
)
from alignpro.config.keys import ReadsOldKeys
from alignpro.config.model import PROMPTER, ModelConfig
from alignpro.config.prompting import LoraConfig, Prompting
from alignpro.config.sft import SftConfig
from alignpro.config.train import TrainConfig

# What `alignpro quickstart` runs where no file is given.
QUICKSTART = Path(__file__).parents[1] / "data" / "quickstart.yaml"


@dataclass(frozen=True)
@checked
class QuickstartConfig(metaclass=ReadsOldKeys):
    """Warm start, training and evaluation in one go.

    The fields here hold for every stage; ``sft``, ``train`` and ``evaluate`` hold the rest.
    """

    prompter: ModelConfig = PROMPTER
    """The model that is trained, with fresh adapters."""
    target: ModelConfig | None = None
    """The frozen model that answers; null is the base weights of the prompter."""
    reward: RewardName = "vader+0.2*topic"
    """The reward: a sum of terms such as "vader+0.2*topic" or "module:function"."""
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    run_dir: Place = "alignpro-quickstart"
    """The directory of the run; a number is added while it exists."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's, which the run
    records."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that is trained."""
    sft: SftConfig = field(default_factory=SftConfig)
    """The warm start."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The reinforcement learning."""
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    """The evaluation."""

    def __post_init__(self) -> None:
        if self.train.policy != "prompter":
            raise ValueError("train.policy: quickstart trains a prompter; use alignpro train")
        adapter, trained = self.prompter.adapter, self.evaluate.trained
        unset = "null: quickstart trains its own adapters"
        require("prompter.adapter", adapter, adapter is None, unset)
        require("evaluate.trained", trained, trained is None, unset)
        only_default(self.evaluate, "kl_coef", "in train.kl_coef", path="evaluate.")
        shared = {f.name for f in dataclasses.fields(self)}
        for stage in ("sft", "train", "evaluate"):
            options = getattr(self, stage)
            for f in dataclasses.fields(options):
                if f.name in shared and getattr(options, f.name) != default_of(f):
                    raise ValueError(
                        f"{stage}.{f.name}: quickstart sets it for every stage; set {f.name} itself"
                    )
        self.stages()  # each has rules for what it shares

    def stages(self) -> tuple[SftConfig, TrainConfig, EvalConfig]:
        """The three stages with the shared fields filled in."""

        def filled(stage: Any) -> Any:
            names = {f.name for f in dataclasses.fields(self)}
            shared = {f.name for f in dataclasses.fields(stage)} & names
            return dataclasses.replace(stage, **{name: getattr(self, name) for name in shared})

        evaluate = filled(self.evaluate)
        if self.train.kl_coef:  # no optimum is at 0
            evaluate = dataclasses.replace(evaluate, kl_coef=self.train.kl_coef)
        return filled(self.sft), filled(self.train), evaluate
