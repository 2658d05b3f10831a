"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.fields import Date, Seed, Threads, above, at_least, checked, require
from alignpro.config.model import PROMPTER, ModelConfig, check_trainable
from alignpro.config.prompting import FitConfig, Prompting


@dataclass(frozen=True)
@checked
class SftConfig(FitConfig):
    """The supervised warm start: fits (prompt, instruction) pairs."""

    prompter: ModelConfig = PROMPTER  # what is trained; its adapter is a fresh one
    data: str = "instructions"  # pairs: packaged name, file, or hub name
    run_dir: str = "alignpro-sft"
    seed: Seed = 0
    steps: Annotated[int, at_least(0)] = 32
    batch_size: Annotated[int, at_least(1)] = 16  # pairs a step
    learning_rate: Annotated[float, above(0)] = 1e-3
    warmup_steps: Annotated[int, at_least(0)] = 3
    # Steps; one is always written at Ctrl-C.
    checkpoint_every: Annotated[int, at_least(1)] = 10
    prompting: Prompting = field(default_factory=Prompting)
    date: Date = None
    threads: Threads = None

    def __post_init__(self) -> None:
        check_trainable("prompter", self.prompter)
        adapter = self.prompter.adapter
        require("prompter.adapter", adapter, adapter is None, "null: a fresh one is trained")
