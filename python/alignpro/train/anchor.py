"""Another prompt for the reference: which rows have one, and what it is (E-RLHF)."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.config import AnchorConfig
from alignpro.data.files import DataError
from alignpro.data.load import PromptRow, read_flag
from alignpro.types import Conversation, Prompt


def anchors_of(config: AnchorConfig, rows: Sequence[PromptRow]) -> list[Prompt | None]:
    """What the reference reads in the place of each row's prompt; None: the prompt itself.

    Raises DataError for a mark that is none, a marked row without a safe prompt, no marked row at
    all, and, unless the configuration allows it, for rows that are all marked. It names the row.
    """
    anchors: list[Prompt | None] = []
    for row in rows:
        safe = row.columns.get(config.column) or ""
        if not isinstance(safe, str):
            expected = f"expected text in column {config.column!r}"
            raise DataError(f"{row.place}: {expected}, got {type(safe).__name__}")
        marked = bool(safe) if config.where is None else read_flag(row, config.where)
        asked = Conversation.of(row.prompt)
        if marked and not safe:
            if config.prefix is None:
                raise DataError(
                    f"{row.place}: marked by {config.where!r}, but column {config.column!r} is "
                    "empty; anchor.prefix would stand before its prompt"
                )
            safe = config.prefix + asked.last_turn
        anchors.append(asked.with_last_turn(safe).short if marked else None)
    count = sum(anchor is not None for anchor in anchors)
    if count == 0:
        by = config.column if config.where is None else config.where
        raise DataError(f"anchor: no row is marked by column {by!r}; null anchors none")
    if count == len(rows) and not config.all_rows:
        raise DataError(
            f"anchor: all {count} rows are marked; expected ordinary prompts among them, which "
            "keep their own reference (anchor.all_rows: true goes on)"
        )
    return anchors
