"""What a rewrite must keep to be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignpro.config.fields import above, at_least, checked


@dataclass(frozen=True)
@checked
class GuardConfig:
    """What a rewrite must keep; one that does not is not used, and the original goes out."""

    spans: bool = True
    """Whether numbers, quotations, code, addresses and what stands between [protected] and
    [/protected] have to be in the rewrite as they were."""
    language: bool = True
    """Whether the rewrite has to be in the prompt's script and language, where both are known."""
    max_growth: Annotated[float, above(0)] | None = 4.0
    """The most characters that are written, as a multiple of the prompt's; null sets no limit."""
    free_characters: Annotated[int, at_least(0)] = 400
    """Characters that may be written whatever the prompt's length."""
    cut: bool = True
    """Whether a rewrite that replaces the prompt (mode rewrite) must not end at its token limit."""
    answered: bool = True
    """Whether a rewrite must not read as an answer to the prompt."""
    echo: bool = True
    """Whether a rewrite must not repeat the prompter's template, or a chat's markers."""


@dataclass(frozen=True)
@checked
class GuardPenaltyConfig(GuardConfig):
    """What a rewrite must keep in training; one that does not costs reward."""

    penalty: Annotated[float, above(0)] = 1.0
    """The reward that a rewrite loses which breaks a guard, once however many it breaks."""
