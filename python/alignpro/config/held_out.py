"""What a training run looks at beside its own prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.data import DataConfig
from alignpro.config.fields import at_least, checked


@dataclass(frozen=True)
@checked
class HeldOutConfig:
    """A few prompts that are not trained on, answered as the training goes on.

    What is read off them goes into the row of the step, and warnings into the row and the terminal.
    They choose nothing by themselves; a person who chooses by them keeps others for the evaluation.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(split="validation"))
    """The prompts to look at; one that is trained on as well is refused."""
    num_prompts: Annotated[int, at_least(2)] | None = 16
    """How many of them are drawn, where there are so many; null is all."""
    every: Annotated[int, at_least(1)] = 10
    """Steps from one look to the next; the first and the last step are looked at, too."""
