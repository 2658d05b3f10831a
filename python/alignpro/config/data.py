"""Where rows come from, and which of their columns are what: one group for every stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from alignpro.config.fields import Place, checked, only_default, require

# What becomes of a prompt that the models cannot read (`models.lengths`).
OnTooLong = Literal["error", "skip", "cut"]


@dataclass(frozen=True)
@checked
class Source:
    """Rows. A text alone is their path: ``data: prompts.csv``."""

    text_field: ClassVar[str] = "path"

    path: Place | None = None
    """A file, a packaged name, or a hub name such as "owner/name" or "owner/name:subset".

    null: the data of the stage around this group.
    """
    split: str | None = "train"
    """The rows to use, by their column "split"; null is all rows.

    A file without that column is all training data ("train"). On the hub it is the split that is
    read, and null is "train".
    """
    subset: str | None = None
    """The subset of a hub set that has several, such as "main"."""
    revision: str | None = None
    """The branch, tag or commit of a hub set; null is the newest."""

    def __post_init__(self) -> None:
        if self.path is None:
            for name in ("subset", "revision"):
                only_default(self, name, "with path")


@dataclass(frozen=True)
@checked
class DataConfig(Source):
    """Prompts."""

    prompt: str | tuple[str, ...] | None = None
    """The column that holds the prompts; null is the first of prompt, messages, conversations and
    turns.

    Of several columns, [instruction, input], the texts make one prompt, a blank line between them.
    """
    system: Literal["keep", "drop"] = "keep"
    """Whether system messages are a part of the prompt; drop is for models that take none."""

    def __post_init__(self) -> None:
        Source.__post_init__(self)
        require("prompt", self.prompt, bool(self.prompt) or self.prompt is None, "a column")
        if isinstance(self.prompt, tuple):
            distinct = len(set(self.prompt)) == len(self.prompt)
            require("prompt", list(self.prompt), distinct, "each column once")

    def of(self, own: DataConfig) -> DataConfig:
        """These rows; of ``own``'s source, and prompt column, where none is named here."""
        if self.path is not None:
            return self
        return replace(own, split=self.split, prompt=self.prompt or own.prompt)


TRAINING = DataConfig("everyday")
HELD_OUT = DataConfig("everyday", split="heldout")


@dataclass(frozen=True)
@checked
class PairsConfig(DataConfig):
    """Prompts, and what the prompter is to write for each."""

    path: Place | None = "instructions"
    """A file, a packaged name, or a hub name."""
    instruction: str = "instruction"
    """The column of what is to be written."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        require("path", self.path, self.path is not None, "a source")


@dataclass(frozen=True)
@checked
class PreferencesConfig(DataConfig):
    """Prompts with two answers each, of which one was preferred."""

    path: Place | None = "warm_tones"
    """A file, a packaged name, or a hub name."""
    chosen: str = "chosen"
    """The column of the preferred answer: text, the messages that follow the prompt, or the whole
    conversation."""
    rejected: str = "rejected"
    """The column of the other answer."""


@dataclass(frozen=True)
@checked
class InstructionsConfig(Source):
    """Candidate instructions."""

    path: Place | None = "instructions"
    """A file, a packaged name, or a hub name."""
    split: str | None = None
    """The rows to use, by their column "split"; null is all rows."""
    instruction: str | None = None
    """The column that holds them; null is "instruction", where that clearly holds no prompts.

    It may, beside columns such as "input" and "output", where no other column is a prompt.
    """

    def __post_init__(self) -> None:
        Source.__post_init__(self)
        require("path", self.path, self.path is not None, "a source")
