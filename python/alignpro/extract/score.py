"""How much of a record is right: precision, recall and F1 of its values against the true record.

Lists are sets: elements are paired so that most values agree (maximum-weight matching), so the
order costs nothing, an element twice costs precision, and one that is split into two costs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignpro.extract.check import Refused, read_leaf
from alignpro.extract.formula import plain_formula
from alignpro.extract.kinds import FieldType, Leaf, Object
from alignpro.extract.schema import Schema
from alignpro.extract.source import same_number
from alignpro.extract.units import comparable

_MOST_NESTED = 32


class FieldScore(NamedTuple):
    """Counts of values; those of several records add up."""

    right: int = 0
    predicted: int = 0
    true: int = 0

    def __add__(self, other: object) -> FieldScore:
        assert isinstance(other, FieldScore)
        return FieldScore(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def precision(self) -> float:
        return self.right / self.predicted if self.predicted else float(self.true == 0)

    @property
    def recall(self) -> float:
        return self.right / self.true if self.true else float(self.predicted == 0)

    @property
    def f1(self) -> float:
        """2 right / (predicted + true); 1 where there is nothing to find and nothing was found."""
        both = self.predicted + self.true
        return 2 * self.right / both if both else 1.0


def score_record(predicted: Any, true: Mapping[str, Any], schema: Schema) -> FieldScore:
    """The values of ``predicted`` that are those of ``true``. A quantity is one value in any unit,
    a text in any case; what is no field of the schema costs precision. None, as of an
    answer that is no record, is a record without a value."""
    root = schema.root
    right = _right(_read(predicted, root), _read(true, root), root)
    return FieldScore(right, _count(predicted), _count(true))


def _count(value: Any, depth: int = 0) -> int:
    """The values in a value; null is none. What is nested beyond any schema is one."""
    if value is None:
        return 0
    if depth < _MOST_NESTED:
        if isinstance(value, Mapping):
            return sum(_count(inner, depth + 1) for inner in value.values())
        if isinstance(value, (list, tuple)):
            return sum(_count(inner, depth + 1) for inner in value)
    return 1


def _read(value: Any, of: FieldType) -> Any:
    """The value as it is compared, each leaf read once; None for what is none of its type."""
    if isinstance(of, Object):
        fields = of.fields.items()
        return (
            {n: _read(value.get(n), t) for n, t in fields} if isinstance(value, Mapping) else None
        )
    if isinstance(of, Leaf):
        return None if value is None else _read_leaf(value, of)
    return [_read(v, of.item) for v in value] if isinstance(value, (list, tuple)) else None


def _read_leaf(value: Any, leaf: Leaf) -> Any:
    try:
        read = read_leaf(value, leaf)
    except Refused:
        return None
    if leaf.kind == "formula":
        return plain_formula(read)
    return read if leaf.kind == "choice" else comparable(read)


def _right(predicted: Any, true: Any, of: FieldType) -> int:
    if predicted is None or true is None:
        return 0
    if isinstance(of, Leaf):
        return int(same_number(predicted, true) if type(true) is float else predicted == true)
    if isinstance(of, Object):
        return sum(_right(predicted[n], true[n], t) for n, t in of.fields.items())
    weights = [[_right(p, t, of.item) for p in predicted] for t in true]
    return sum(weights[row][column] for row, column in best_assignment(weights))


def best_assignment(weights: list[list[int]]) -> list[tuple[int, int]]:
    """Pairs (row, column), none of them twice, whose sum of weights is the greatest.

    The Hungarian method by shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987):
    min(rows, columns)^2 * max(rows, columns) steps.
    """
    rows, columns = len(weights), len(weights[0]) if weights else 0
    if rows > columns:
        flipped = [[weights[r][c] for r in range(rows)] for c in range(columns)]
        return [(row, column) for column, row in best_assignment(flipped)]
    of_row, of_column = [0] * rows, [0] * (columns + 1)  # the dual variables
    row_of: list[int | None] = [None] * (columns + 1)  # the last column is where a row starts
    for row in range(rows):
        row_of[columns] = row
        at = columns
        distance = [float("inf")] * columns
        came_from = [columns] * columns
        done = [False] * (columns + 1)
        while (here := row_of[at]) is not None:
            done[at] = True
            nearest, step = -1, float("inf")
            for column in range(columns):
                if done[column]:
                    continue
                cost = -weights[here][column] - of_row[here] - of_column[column]
                if cost < distance[column]:
                    distance[column], came_from[column] = cost, at
                if distance[column] < step:
                    nearest, step = column, distance[column]
            for column in range(columns + 1):
                if done[column]:
                    owner = row_of[column]
                    assert owner is not None
                    of_row[owner] += int(step)
                    of_column[column] -= int(step)
                elif column < columns:
                    distance[column] -= step
            at = nearest
        while at != columns:
            row_of[at] = row_of[came_from[at]]
            at = came_from[at]
    return [(owner, c) for c, owner in enumerate(row_of[:columns]) if owner is not None]
