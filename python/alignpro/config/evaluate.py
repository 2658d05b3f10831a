"""Evaluation on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.config.fields import require
from alignpro.config.prompting import RESPONSE, REWRITE, Prompting, check_sampling
from alignpro.types import SamplingParams


@dataclass(frozen=True)
class EvalConfig:
    """Raw prompt, untuned prompter and trained prompter on held-out prompts."""

    model: str = "smollm2"
    target: str | None = None
    target_compute: Literal["float32", "int8"] = "float32"
    untuned: str | None = None  # PEFT folder; None: the base model as prompter
    trained: str | None = None  # PEFT folder; None: no trained arm
    data: str = "everyday"
    split: str | None = "heldout"
    reward: str = "vader+0.2*topic"
    seed: int = 0
    num_prompts: int | None = None  # the first so many rows; None: all
    num_rewrites: int = 4  # rewrites a prompt; the raw arm gets as many responses
    num_responses: int = 1  # responses a rewrite
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    num_samples: int = 3  # before/after samples kept in the report
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_rewrites", "num_responses"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.num_prompts is not None:
            require("num_prompts", self.num_prompts, self.num_prompts >= 2, "at least 2")
        require("num_samples", self.num_samples, self.num_samples >= 0, "0 or more")
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
