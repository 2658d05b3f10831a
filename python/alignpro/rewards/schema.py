"""Is the response the record of its prompt, by a schema? Graded, and judged without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.extract.draw import judge_answer
from alignpro.extract.parse import as_record
from alignpro.extract.schema import FORMATS, Format, read_schema
from alignpro.extract.score import score_record
from alignpro.rewards.check import read_rows
from alignpro.types import Texts

_PARTS = ("valid", "schema", "checks", "f1")


class SchemaReward:
    """The weighted mean, in [0, 1], of

    * ``valid``: 1 where the response is a record,
    * ``schema``: the share of values that are right by themselves, missing ones counted,
    * ``checks``: the share of checks between fields that are passed, of those that could be made or
      lack a value that must be there; as ``schema`` where there is none,
    * ``f1``: agreement with the true record, where the data have a column of it.

    The prompt is the text that the record is from. A record without a single right value scores 0
    in all of them: nothing is won by saying nothing.

    Args:
        path: a schema's file, or the name of a packaged one.
        format: what the target writes, "json" or "lines".
        record: the column of the true record.
        valid, schema, checks, f1: the weights; 0 leaves a part out of the mean.

    Raises ValueError for a schema that is none or a column without records.
    """

    def __init__(
        self,
        path: str,
        format: Format = "json",
        record: str = "record",
        valid: float = 1.0,
        schema: float = 1.0,
        checks: float = 1.0,
        f1: float = 1.0,
    ) -> None:
        self.schema = read_schema(path)
        self.name = f"schema:{path}"
        if format not in FORMATS:
            raise ValueError(f"{self.name}: format: expected json or lines, got {format!r}")
        self._format: Format = format
        self._column = record
        self.weights = dict(zip(_PARTS, (valid, schema, checks, f1), strict=True))
        for part, weight in self.weights.items():
            good = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not good or not 0 <= weight < math.inf:
                raise ValueError(f"{self.name}: {part}: expected a weight, got {weight!r}")
        if not valid + schema + checks:
            raise ValueError(f"{self.name}: expected a weight above 0 beside that of f1")

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """The column of true records is the data's to have: nothing is required."""
        self._true(columns)

    def components(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> dict[str, list[float]]:
        """The parts by name, each [rows] in [0, 1]; f1 where there are true records."""
        records = self._true(columns)
        parts: dict[str, list[float]] = {name: [] for name in _PARTS}
        for row, (text, response) in enumerate(zip(prompts, responses, strict=True)):
            record, verdict = judge_answer(response, self.schema, self._format, text)
            values = verdict.right + verdict.wrong
            right = verdict.right / values if values else 0.0
            made = verdict.passed + verdict.failed + verdict.blocked
            some = float(verdict.right > 0)
            parts["valid"].append(some)
            parts["schema"].append(right)
            parts["checks"].append(some * (verdict.passed / made if made else right))
            if records is not None:
                score = score_record(record, records[row], self.schema)
                parts["f1"].append(some * score.f1)
        if records is None:
            del parts["f1"]
        return parts

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted mean of what ``components`` returned: [rows]."""
        weights = {name: self.weights[name] for name in components}
        whole = math.fsum(weights.values())
        rows = zip(*components.values(), strict=True)
        return [
            math.fsum(w * part for w, part in zip(weights.values(), row, strict=True)) / whole
            for row in rows
        ]

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        return self.total(self.components(prompts, rewrites, responses, **columns))

    def _true(self, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]] | None:
        records = columns.get(self._column)
        if records is None:
            return None
        return read_rows(f"column {self._column!r}", map(as_record, records))
