"""The parts of a check, with their types, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from alignpro.extract.kinds import Leaf, Path
from alignpro.extract.ranges import Bound
from alignpro.extract.scope import Scope
from alignpro.extract.units import PLAIN, Dimension, dimension_name


@dataclass(frozen=True)
class Term:
    """A part of a check, typed."""

    kind: str  # truth, text, formula, number, list, object
    run: Callable[[Scope], Any]
    dimension: Dimension = PLAIN
    point: bool | None = None  # whether it is a temperature, and no difference; None: may be either
    fields: tuple[Path, ...] = ()  # in order of reading
    lists: tuple[Path, ...] = ()  # whose elements it is of, the outer first
    leaf: Leaf | None = None  # of a term that is a field
    sides: tuple[Term, Term] | None = None  # of a comparison: what is found and what is expected
    bounds: tuple[Bound, ...] = ()  # that hold wherever it is true


def refuse(problem: str) -> NoReturn:
    raise ValueError(problem)


def kind_name(term: Term) -> str:
    return dimension_name(term.dimension) if term.kind == "number" else f"a {term.kind}"


def joined(*terms: Term) -> dict[str, Any]:
    """The fields of the terms, and the lists that they are all of."""
    fields = tuple(dict.fromkeys(path for term in terms for path in term.fields))
    deepest: tuple[Path, ...] = max((term.lists for term in terms), key=len, default=())
    for term in terms:
        if term.lists != deepest[: len(term.lists)]:
            one, other = ".".join(deepest[-1]), ".".join(term.lists[-1])
            refuse(
                f"the elements of {one} and {other} are of two lists; sum, mean, min, max or count "
                "makes one value of a list"
            )
    return {"fields": fields, "lists": deepest}


def point_of(*terms: Term, where: str) -> bool | None:
    """`Term.point` of what is made of the terms. Raises ValueError for a temperature that is
    compared with a difference or a sum, which the zeros of degC and degF do not go into."""
    points = {term.point for term in terms}
    if points == {True}:
        return where in ("min", "max", "mean")
    if points >= {True, False}:
        if where in ("+", "-"):
            return True
        refuse(
            f"{where}: a temperature, and a difference or sum of such, are not compared; a "
            'difference is quantity(5, "K")'
        )
    return False if False in points else None


def check_same(left: Term, right: Term, where: str) -> None:
    if left.dimension == right.dimension:
        return
    hint = ""
    if PLAIN in (left.dimension, right.dimension):
        hint = '; a number with its unit is quantity(5, "g")'
    refuse(f"{where}: {kind_name(left)} and {kind_name(right)} do not compare{hint}")


def dimension_of(left: Term, right: Term, power: int) -> Dimension:
    a, b, c, d, e = (x + power * y for x, y in zip(left.dimension, right.dimension, strict=True))
    return a, b, c, d, e
