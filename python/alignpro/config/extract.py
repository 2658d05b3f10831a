"""Records out of texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from alignpro.config.data import DataConfig, OnTooLong
from alignpro.config.fields import Date, Place, Seed, Threads, at_least, checked
from alignpro.config.model import PROMPTER, PROMPTER_HERE, ModelConfig, check_local
from alignpro.config.prompting import REWRITE, Prompting, check_sampling
from alignpro.types import SamplingParams

RECORD = SamplingParams(max_new_tokens=256, temperature=0.7)


@dataclass(frozen=True)
@checked
class SchemaConfig:
    """What records hold, and how they are written. A text alone is the schema."""

    text_field: ClassVar[str] = "path"

    path: Place = "reaction"
    """The schema: a JSON file, or a packaged name (reaction, reaction_flat, recipe, meeting)."""
    format: Literal["json", "lines"] = "json"
    """How a model writes a record: as a JSON object, or a line for each field, which small models
    learn sooner."""
    record: str = "record"
    """The column of the true records, where the data have it."""


@dataclass(frozen=True)
@checked
class ExtractConfig:
    """A frozen target that extracts records by a schema, and a verifier that judges them."""

    schema: SchemaConfig | None = None
    """What records hold, and how they are written."""
    data: DataConfig = field(default_factory=lambda: DataConfig(split=None, prompt="text"))
    """The texts; what is written for a row is keyed by its number."""
    target: ModelConfig = PROMPTER
    """The model that extracts; its adapter is that of one that was taught to."""
    prompter: ModelConfig | None = None
    """A model that rewrites the texts' prompts before each draw; null rewrites nothing."""
    attempts: Annotated[int, at_least(1)] = 4
    """The most draws for a text; the first that verifies is taken."""
    num_texts: Annotated[int, at_least(1)] | None = None
    """How many of the rows are used, the first ones; null is all."""
    on_too_long: OnTooLong = "error"
    """What becomes of a text that a model cannot read: an error before the first draw, its row left
    out, or the text cut.

    See `StageConfig.on_too_long`."""
    rewrite: SamplingParams = REWRITE
    """How the prompter is sampled."""
    response: SamplingParams = RECORD
    """How the target is sampled."""
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together; the schema's own template is the target's, unless
    there is another one here."""
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    def __post_init__(self) -> None:
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        if self.prompter is not None:
            check_local("prompter", self.prompter, PROMPTER_HERE)
