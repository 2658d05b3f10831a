"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.data import PairsConfig
from alignpro.config.extract import SchemaConfig
from alignpro.config.fields import Place, above, at_least, checked, require
from alignpro.config.keys import ReadsOldKeys
from alignpro.config.model import PROMPTER, ModelConfig, check_trainable
from alignpro.config.prompting import PairsFitConfig, Prompting, check_tuner


@dataclass(frozen=True)
@checked
class SftConfig(PairsFitConfig, metaclass=ReadsOldKeys):
    """The supervised warm start: fits (prompt, instruction) pairs."""

    prompter: ModelConfig = PROMPTER
    """The model that is trained, with a fresh adapter."""
    data: PairsConfig = field(default_factory=PairsConfig)
    """The pairs of prompt and instruction."""
    schema: SchemaConfig | None = None
    """What is taught instead of instructions: to extract records by this schema, from prompts that
    have a column of true records; null teaches instructions.

    The prompts are then read in the template of the schema.
    """
    run_dir: Place = "alignpro-sft"
    """The directory of the run."""
    steps: Annotated[int, at_least(0)] = 32
    learning_rate: Annotated[float, above(0)] = 1e-3
    warmup_steps: Annotated[int, at_least(0)] = 3
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""

    def __post_init__(self) -> None:
        check_tuner(self)
        check_trainable("prompter", self.prompter)
        adapter = self.prompter.adapter
        require("prompter.adapter", adapter, adapter is None, "null: a fresh one is trained")
