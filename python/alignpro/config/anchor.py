"""Another prompt for the reference."""

from __future__ import annotations

from dataclasses import dataclass

from alignpro.config.fields import checked


@dataclass(frozen=True)
@checked
class AnchorConfig:
    """On marked prompts the policy is held to what the reference writes for a safe one (E-RLHF,
    arXiv 2408.01420)."""

    column: str = "safe_prompt"
    """The column with the prompt that the reference reads instead, of the last user turn."""
    prefix: str | None = None
    """What the reference reads before the prompt in marked rows whose column is empty; null is an
    error there."""
    where: str | None = None
    """The column that marks the rows, by true and false; null marks those with a safe prompt."""
    all_rows: bool = False
    """Whether all rows may be marked.

    Ordinary prompts then lose, and the paper found marked ones no safer.
    """
