"""The metrics log: one JSON object a line, one line a step, on disk before the next step starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignpro.files import append_line, write_file


class MetricsLog:
    """Appends rows to a JSONL file and flushes each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. NaN and infinities are written as null: JSON has no word for them."""
        append_line(self.path, json.dumps(_finite(row)))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log. A last line cut short by a crash is left out."""
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]}")
        rows.append(row)
    return rows


def truncate_metrics(path: str | Path, *, steps: int) -> None:
    """Drop the rows of steps at or after ``steps``: what a resumed run writes again."""
    path = Path(path)
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] < steps]
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
