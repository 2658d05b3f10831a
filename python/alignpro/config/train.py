"""Reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.config.fields import Bytes, check_micro_batches, check_optimizer, require
from alignpro.config.prompting import (
    RESPONSE,
    REWRITE,
    LoraConfig,
    Prompting,
    check_on_policy,
    check_sampling,
)
from alignpro.types import SamplingParams


@dataclass(frozen=True)
class TrainConfig:
    """Reinforcement learning of the prompter with a KL leash."""

    # What is trained, and on what.
    model: str = "smollm2"  # path or name of the prompter's base weights
    adapter: str | None = None  # PEFT folder to start from; it is the reference, too
    target: str | None = None  # path or name of the frozen target; None: the prompter's base
    target_compute: Literal["float32", "int8"] = "float32"  # int8 is faster, less exact
    data: str = "everyday"  # prompts: packaged name, file, or hub name
    split: str | None = "train"  # rows whose "split" column says so; None: all rows
    reward: str = "vader+0.2*topic"
    run_dir: str = "alignpro-run"
    seed: int = 0

    # One step.
    steps: int = 20
    prompts_per_step: int = 16
    num_rewrites: int = 4  # N, rewrites a prompt: the group that the baseline is taken over
    num_responses: int = 1  # M, responses a rewrite
    # The policy is the untruncated distribution at this temperature.
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)

    # The objective: mean reward - kl_coef * KL(prompter || reference), KL in nats per rewrite.
    kl_coef: float = 0.05
    strict_parity: bool = True  # stop unless sampled and scored log-probabilities are equal

    # A step is scored in micro-batches, which never change its gradient: each as large as fits.
    memory_limit: Bytes = 2**29  # what one forward and backward may hold; or text: "800MiB"
    # auto: keep activations for the backward, unless recomputing them is cheaper than smaller
    # micro-batches, or the only way.
    activations: Literal["auto", "keep", "recompute"] = "auto"
    micro_batch_size: int | None = None  # the most rewrites in a micro-batch; None: any number

    # The optimizer: AdamW.
    learning_rate: float = 3e-4
    warmup_steps: int = 2  # linear, from 0
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: down to 0 at the last step
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: LoraConfig = field(default_factory=LoraConfig)  # without an adapter to start from

    checkpoint_every: int = 10  # steps; one is always written at the end and at Ctrl-C
    threads: int | None = None  # None: the container's CPU quota

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 0, "0 or more")
        require("prompts_per_step", self.prompts_per_step, self.prompts_per_step >= 1, "1 or more")
        require(
            "num_rewrites",
            self.num_rewrites,
            self.num_rewrites >= 2,
            "at least 2: the baseline is the mean of the other rewrites of the prompt",
        )
        require("num_responses", self.num_responses, self.num_responses >= 1, "at least 1")
        require("kl_coef", self.kl_coef, self.kl_coef >= 0, "0 or more")
        require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "1 or more")
        check_optimizer(self)
        check_micro_batches(self)
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        check_on_policy(self.rewrite)
