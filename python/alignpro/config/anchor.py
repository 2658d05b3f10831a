"""Another prompt for the reference."""

from __future__ import annotations

from dataclasses import dataclass

from alignpro.config.fields import checked, only_default, require


@dataclass(frozen=True)
@checked
class AnchorConfig:
    """On marked prompts the policy is held to what the reference writes for a safe one (E-RLHF and
    E-DPO, arXiv 2408.01420)."""

    column: str | None = "safe_prompt"
    """The column with the prompt that the reference reads instead, of the last user turn; null is
    for the prefix alone."""
    prefix: str | None = None
    """What the reference reads before the prompt in marked rows whose column is empty; null is an
    error there."""
    where: str | None = None
    """The column that marks the rows, by true and false; null marks those with a safe prompt."""
    all_rows: bool = False
    """Whether every row is marked.

    Ordinary prompts then lose, and the paper found marked ones no safer.
    """

    def __post_init__(self) -> None:
        if self.all_rows:
            only_default(self, "where", "without all_rows, which marks every row")
        if self.column is None:
            marks = self.where is not None or self.all_rows
            require("where", self.where, marks, "a column that marks the rows, as column is null")
            require("prefix", self.prefix, self.prefix is not None, "a text, as column is null")
