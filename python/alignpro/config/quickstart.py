"""Every stage in one configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from alignpro.config.evaluate import EvalConfig
from alignpro.config.fields import checked, default_of
from alignpro.config.prompting import LoraConfig, Prompting
from alignpro.config.sft import SftConfig
from alignpro.config.train import TrainConfig


@dataclass(frozen=True)
@checked
class QuickstartConfig:
    """Warm start, training and evaluation in one go.

    The fields here hold for every stage; ``sft``, ``train`` and ``evaluate`` hold the rest.
    """

    model: str = "smollm2"
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    reward: str = "vader+0.2*topic"
    seed: int = 0
    run_dir: str = "alignpro-quickstart"  # a number is added while the directory exists
    threads: int | None = None
    prompting: Prompting = field(default_factory=Prompting)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.train.policy != "prompter":
            raise ValueError("train.policy: quickstart trains a prompter; use alignpro train")
        shared = {f.name for f in dataclasses.fields(self)} | {"adapter", "untuned", "trained"}
        for stage in (self.sft, self.train, self.evaluate):
            for f in dataclasses.fields(stage):
                if f.name in shared and getattr(stage, f.name) != default_of(f):
                    room = _stage_name(stage)
                    raise ValueError(
                        f"{room}.{f.name}: quickstart sets it for every stage; set {f.name} itself"
                        if f.name not in ("adapter", "untuned", "trained")
                        else f"{room}.{f.name}: quickstart trains its own adapters; leave it unset"
                    )

    def stages(self) -> tuple[SftConfig, TrainConfig, EvalConfig]:
        """The three stages with the shared fields filled in."""
        shared: dict[str, Any] = {
            "model": self.model,
            "prompter_device": self.prompter_device,
            "prompter_compute": self.prompter_compute,
            "prompter_mode": self.prompter_mode,
            "seed": self.seed,
            "threads": self.threads,
            "prompting": self.prompting,
        }
        sft = dataclasses.replace(self.sft, **shared, lora=self.lora, run_dir=self.run_dir)
        train = dataclasses.replace(
            self.train, **shared, lora=self.lora, run_dir=self.run_dir, reward=self.reward
        )
        evaluate = dataclasses.replace(self.evaluate, **shared, reward=self.reward)
        return sft, train, evaluate


def _stage_name(stage: SftConfig | TrainConfig | EvalConfig) -> str:
    return {SftConfig: "sft", TrainConfig: "train", EvalConfig: "evaluate"}[type(stage)]
