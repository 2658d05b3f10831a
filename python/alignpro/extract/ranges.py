"""Whether any value of a field can pass its range and the checks that compare it with a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from alignpro.extract.kinds import FieldType, Leaf, ListOf, Object, Path
from alignpro.extract.units import TEMPERATURE

_SLACK = 2e-9  # relative: more than the verifier grants to ``==``, min and max


@dataclass(frozen=True)
class Bound:
    """What has to hold of a field: its value, compared with a number, both in base units."""

    path: Path
    sign: str
    value: float
    text: str  # that requires it

    def of(self, side: str) -> tuple[float, bool]:
        """The end of a range on side ">" (the lower one) or "<", and whether it is outside."""
        if self.sign == "==":
            return self.value + _slack(self.value, side), False
        if self.sign[0] == side:
            return self.value, self.sign == side
        return (-math.inf if side == ">" else math.inf), False


def check_possible(root: Object, bounds: Iterable[Bound]) -> None:
    """Raises ValueError for a field of which no value passes all of its bounds, min and max; ``!=``
    takes a value out, and no range."""
    by_path: dict[Path, list[Bound]] = {}
    for bound in bounds:
        by_path.setdefault(bound.path, []).append(bound)
    for path, leaf in _leaves(root, ()):
        every = [*by_path.get(path, ()), *_of_type(path, leaf)]
        if not every:
            continue
        low = max(every, key=lambda bound: bound.of(">"))
        high = min(every, key=lambda bound: (bound.of("<")[0], not bound.of("<")[1]))
        if _is_empty(low.of(">"), high.of("<"), whole=leaf.kind == "integer"):
            texts = " and ".join(dict.fromkeys((low.text, high.text)))
            raise ValueError(f"no value of {'.'.join(path)} passes {texts}")


def _leaves(of: FieldType, path: Path) -> Iterator[tuple[Path, Leaf]]:
    while isinstance(of, ListOf):
        of = of.item
    if isinstance(of, Leaf):
        yield path, of
    else:
        for name, inner in of.fields.items():
            yield from _leaves(inner, (*path, name))


def _slack(value: float, side: str) -> float:
    return math.copysign(_SLACK * value, -1 if side == ">" else 1)


def _of_type(path: Path, leaf: Leaf) -> list[Bound]:
    found = [Bound(path, ">=", 0.0, "0 K")] if leaf.dimension == TEMPERATURE else []
    for name, sign, value in (("min", ">=", leaf.least), ("max", "<=", leaf.most)):
        if value is not None:
            base = value if leaf.unit is None else leaf.unit.to_base(value)
            base += _slack(base, sign[0])
            found.append(Bound(path, sign, base, f"its {name} {value:g}"))
    return found


def _is_empty(low: tuple[float, bool], high: tuple[float, bool], *, whole: bool) -> bool:
    (least, above), (most, below) = low, high
    if whole and math.isfinite(least) and math.isfinite(most):
        first = math.floor(least) + 1 if above else math.ceil(least)
        last = math.ceil(most) - 1 if below else math.floor(most)
        return first > last
    return least > most or (least == most and (above or below))
