"""The types of a schema's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from alignpro.extract.units import PLAIN, Dimension, Unit, comparable

Kind = Literal["text", "formula", "number", "integer", "boolean", "quantity", "choice"]
NUMERIC = ("number", "integer", "quantity")
Path = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """One value."""

    kind: Kind
    unit: Unit | None = None  # of a quantity, or the percent of a number
    choices: tuple[str, ...] = ()
    optional: bool = False
    least: float | None = None  # in ``unit``
    most: float | None = None
    grounded: bool = False  # whether it has to occur in the source
    description: str = ""

    @property
    def dimension(self) -> Dimension:
        return PLAIN if self.unit is None else self.unit.dimension

    @cached_property
    def choice_of(self) -> dict[str, str]:
        """The choices as they are compared: there may be thousands, and as many values."""
        return {comparable(choice): choice for choice in self.choices}


@dataclass(frozen=True)
class ListOf:
    """Values or objects without an order."""

    item: Leaf | ListOf | Object
    least: int = 0
    most: int | None = None
    description: str = ""

    @property
    def optional(self) -> bool:
        return self.least == 0


@dataclass(frozen=True)
class Object:
    """Fields by name."""

    fields: Mapping[str, Leaf | ListOf | Object] = field(default_factory=dict)
    optional: bool = False
    description: str = ""


FieldType = Leaf | ListOf | Object


def find(root: Object, path: Path) -> tuple[FieldType, list[Path]]:
    """The type that a dotted path names, and the lists that it goes through to it. A path goes
    through a list to the fields of what is in it; one that ends at a list is the list.

    Raises KeyError: the first part of the path that there is not.
    """
    at: FieldType = root
    lists: list[Path] = []
    for number, name in enumerate(path):
        while isinstance(at, ListOf):
            lists.append(path[:number])
            at = at.item
        if not isinstance(at, Object) or name not in at.fields:
            raise KeyError(".".join(path[: number + 1]))
        at = at.fields[name]
    return at, lists
