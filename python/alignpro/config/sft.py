"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.config.fields import (
    Bytes,
    check_micro_batches,
    check_optimizer,
    check_prompter,
    checked,
    require,
)
from alignpro.config.prompting import LoraConfig, Prompting


@dataclass(frozen=True)
@checked
class SftConfig:
    """The supervised warm start: fits (prompt, instruction) pairs."""

    model: str = "smollm2"  # path or name of the prompter's base weights
    # On a CUDA device, in a build that has it: bfloat16 or float32. On the CPU: float32.
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    data: str = "instructions"  # pairs: packaged name, file, or hub name
    run_dir: str = "alignpro-sft"
    seed: int = 0
    steps: int = 32
    batch_size: int = 16  # pairs a step
    learning_rate: float = 1e-3
    warmup_steps: int = 3  # linear, from 0
    lr_schedule: Literal["constant", "linear"] = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # As in `TrainConfig`.
    memory_limit: Bytes = 2**29
    activations: Literal["auto", "keep", "recompute"] = "auto"
    micro_batch_size: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompting: Prompting = field(default_factory=Prompting)
    threads: int | None = None  # None: the container's CPU quota

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 0, "0 or more")
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        check_prompter(self)
        check_optimizer(self)
        check_micro_batches(self)
