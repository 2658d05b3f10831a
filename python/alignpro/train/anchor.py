"""Another prompt for the reference: which rows have one, and what it is (E-RLHF, E-DPO)."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.config import AnchorConfig
from alignpro.data.files import DataError
from alignpro.data.load import DataRow, check_unicode, read_flag
from alignpro.types import Conversation, Prompt


def anchor_of(config: AnchorConfig | None, row: DataRow) -> Prompt | None:
    """What the reference reads in the place of the row's prompt; None: the prompt itself.

    Raises DataError, which names the row, for a mark that is none, and for a marked row without a
    safe prompt.
    """
    if config is None:
        return None
    safe = "" if config.column is None else row.columns.get(config.column) or ""
    if not isinstance(safe, str):
        expected = f"expected text in column {config.column!r}"
        raise DataError(f"{row.place}: {expected}, got {type(safe).__name__}")
    check_unicode(safe, f"{row.place}, column {config.column!r}")
    safe = safe if safe.strip() else ""
    marked = bool(safe) if config.where is None else read_flag(row, config.where)
    if not (marked or config.all_rows):
        return None
    asked = Conversation.of(row.prompt)
    if not safe:
        if config.prefix is None:
            raise DataError(
                f"{row.place}: marked by {config.where or 'all_rows'!r}, but column "
                f"{config.column!r} is empty; anchor.prefix would stand before its prompt"
            )
        safe = config.prefix + asked.last_turn
    return asked.with_last_turn(safe).short


def anchors_of(config: AnchorConfig, rows: Sequence[DataRow]) -> list[Prompt | None]:
    """`anchor_of` each of the rows that are trained on.

    Raises DataError also for a column that no row has, where no row is marked, and where all are
    without ``all_rows``.
    """
    anchors = [anchor_of(config, row) for row in rows]
    count = sum(anchor is not None for anchor in anchors)
    if count == 0:
        by = config.column if config.where is None else config.where
        raise DataError(f"anchor: no row is marked by column {by!r}; null anchors none")
    if count == len(rows) and not config.all_rows:
        raise DataError(
            f"anchor: all {count} rows are marked; expected ordinary prompts among them, which "
            "keep their own reference (anchor.all_rows: true goes on)"
        )
    if config.column is not None and not any(config.column in row.columns for row in rows):
        raise DataError(
            f"anchor: no row has a column {config.column!r}; anchor.column: null is for the prefix "
            "alone"
        )
    return anchors
