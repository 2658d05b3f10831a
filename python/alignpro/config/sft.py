"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.data import OnTooLong, PairsConfig
from alignpro.config.fields import Date, Seed, Threads, above, at_least, checked, require
from alignpro.config.model import PROMPTER, ModelConfig, check_trainable
from alignpro.config.prompting import REWRITE, FitConfig, Prompting
from alignpro.types import SamplingParams


@dataclass(frozen=True)
@checked
class SftConfig(FitConfig):
    """The supervised warm start: fits (prompt, instruction) pairs."""

    prompter: ModelConfig = PROMPTER
    """The model that is trained, with a fresh adapter."""
    data: PairsConfig = field(default_factory=PairsConfig)
    """The pairs of prompt and instruction."""
    on_too_long: OnTooLong = "error"
    """What becomes of a pair that the prompter's context does not hold: an error before the first
    step, its row left out, or the prompt cut.

    What is to be written is never cut. See `StageConfig.on_too_long`.
    """
    run_dir: str = "alignpro-sft"
    """The directory of the run."""
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    steps: Annotated[int, at_least(0)] = 32
    batch_size: Annotated[int, at_least(1)] = 16
    """Pairs in a step."""
    learning_rate: Annotated[float, above(0)] = 1e-3
    warmup_steps: Annotated[int, at_least(0)] = 3
    checkpoint_every: Annotated[int, at_least(1)] = 10
    """Steps from one checkpoint to the next; one is always written at the end and at Ctrl-C."""
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's, which the run
    records."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    @property
    def rewrite(self) -> SamplingParams:
        """How its prompter is sampled, as `StageConfig` has it."""
        return REWRITE

    def __post_init__(self) -> None:
        check_trainable("prompter", self.prompter)
        adapter = self.prompter.adapter
        require("prompter.adapter", adapter, adapter is None, "null: a fresh one is trained")
