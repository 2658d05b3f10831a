"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.data import PairsConfig
from alignpro.config.extract import SchemaConfig
from alignpro.config.fields import Place, above, at_least, checked, only_default, require
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
    instructions: tuple[str, ...] | None = None
    """Instructions that the data's prompts are paired with at random, "" for none; null takes those
    of the data.

    Each as often as another, whatever the prompt: the prompter then knows them, and nothing of when
    they apply, which training is to find (docs/algorithms.md).
    """
    instructions_per_prompt: Annotated[int, at_least(1)] = 3
    """How many of ``instructions`` a prompt is paired with."""
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
        if self.instructions is None:
            only_default(self, "instructions_per_prompt", "with instructions")
            return
        only_default(self, "schema", "without instructions")
        only_default(self.data, "instruction", "without instructions", "data.")
        texts, count = list(self.instructions), self.instructions_per_prompt
        distinct = len(texts) > 1 and len({text.strip() for text in texts}) == len(texts)
        require("instructions", texts, distinct, "two texts or more, each once")
        at_most = f"at most the {len(texts)} instructions there are"
        require("instructions_per_prompt", count, count <= len(texts), at_most)
