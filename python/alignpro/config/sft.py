"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from alignpro.config.fields import Bytes, Seed, Threads, above, at_least, checked, require
from alignpro.config.model import PROMPTER, ModelConfig, check_trainable
from alignpro.config.prompting import LoraConfig, Prompting


@dataclass(frozen=True)
@checked
class SftConfig:
    """The supervised warm start: fits (prompt, instruction) pairs."""

    prompter: ModelConfig = PROMPTER  # what is trained; its adapter is a fresh one
    data: str = "instructions"  # pairs: packaged name, file, or hub name
    run_dir: str = "alignpro-sft"
    seed: Seed = 0
    steps: Annotated[int, at_least(0)] = 32
    batch_size: Annotated[int, at_least(1)] = 16  # pairs a step
    # The optimizer and the micro-batches, as in `TrainConfig`.
    learning_rate: Annotated[float, above(0)] = 1e-3
    warmup_steps: Annotated[int, at_least(0)] = 3
    lr_schedule: Literal["constant", "linear"] = "constant"
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_grad_norm: Annotated[float, above(0)] = 1.0
    memory_limit: Bytes = 2**29
    activations: Literal["auto", "keep", "recompute"] = "auto"
    micro_batch_size: Annotated[int, at_least(1)] | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompting: Prompting = field(default_factory=Prompting)
    threads: Threads = None

    def __post_init__(self) -> None:
        check_trainable("prompter", self.prompter)
        adapter = self.prompter.adapter
        require("prompter.adapter", adapter, adapter is None, "null: a fresh one is trained")
