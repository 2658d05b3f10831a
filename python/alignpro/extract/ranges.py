"""Whether values of the fields can pass their ranges and the checks that compare them with numbers
and with each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from alignpro.extract.kinds import FieldType, Leaf, ListOf, Object, Path
from alignpro.extract.units import TEMPERATURE

_ROUNDED = 2e-12  # relative: what the verifier takes for one number in an order
_SLACK = 2e-9  # relative: more than the verifier grants to ``==``
_MOST_ORDERS = 200  # that are followed from field to field, in time of their number squared


@dataclass(frozen=True)
class Bound:
    """What has to hold of a field: its value, compared with a number in base units or another's."""

    path: Path
    sign: str
    value: float | Path
    text: str  # that requires it

    def of(self, side: str) -> tuple[float, bool]:
        """The end of a range on side ">" (the lower one) or "<", and whether it is outside."""
        if isinstance(self.value, float):
            if self.sign == "==":
                return self.value + _slack(self.value, side), False
            if self.sign[0] == side:
                return self.value, self.sign == side
        return (-math.inf if side == ">" else math.inf), False


# The lower end of a field, its steps above a number, and the bounds it follows from, its own first.
_Low = tuple[float, int, tuple[Bound, ...]]


def check_possible(root: Object, bounds: Iterable[Bound]) -> None:
    """Raises ValueError for fields that have no values which, all there, pass their bounds, min and
    max; ``!=`` takes a value out, and no range."""
    by_path: dict[Path, list[Bound]] = {}
    for bound in bounds:
        by_path.setdefault(bound.path, []).append(bound)
    leaves = dict(_leaves(root, ()))
    for path, leaf in leaves.items():
        by_path.setdefault(path, []).extend(_of_type(path, leaf))
    for path, (least, steps, because) in _lows(by_path).items():
        every = by_path[path]
        high = min(every, key=lambda b: (b.of("<")[0], not b.of("<")[1]), default=None)
        whole = leaves[path].kind == "integer"
        if high is not None and _is_empty((least, steps > 0), high.of("<"), whole=whole):
            _refuse(*because, high)


def _lows(by_path: dict[Path, list[Bound]]) -> dict[Path, _Low]:
    """The lower ends of the fields: those of their own bounds, raised by what they are above."""
    lows: dict[Path, _Low] = {}
    for path, every in by_path.items():
        ends = [(*bound.of(">"), (bound,)) for bound in every]
        lows[path] = max(ends, key=lambda end: end[:2], default=(-math.inf, 0, ()))
    orders = [(b, b.value) for of in by_path.values() for b in of if not isinstance(b.value, float)]
    orders = [(order, below) for order, below in orders if order.sign in (">", ">=", "==")]
    raised = True
    while raised:
        raised = False
        for order, below in orders[:_MOST_ORDERS]:
            least, steps, because = lows[below]
            steps += order.sign == ">"
            if (least, steps) > lows[order.path][:2]:
                through = [bound.path for bound in because]
                if below == order.path or order.path in through:  # it is above itself
                    _refuse(order, *because[: through.index(order.path)] if through else ())
                lows[order.path] = least, steps, (order, *because)
                raised = True
    return lows


def _refuse(*bounds: Bound) -> NoReturn:
    names = list(dict.fromkeys(".".join(bound.path) for bound in bounds))
    texts = " and ".join(dict.fromkeys(bound.text for bound in bounds))
    if len(names) == 1:
        raise ValueError(f"no value of {names[0]} passes {texts}")
    raise ValueError(f"no values of {' and '.join(names)} pass {texts}")


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
            found.append(Bound(path, sign, base, f"its {name} {value:g}"))
    return found


def _is_empty(low: tuple[float, bool], high: tuple[float, bool], *, whole: bool) -> bool:
    (least, above), (most, below) = low, high
    if whole and math.isfinite(least) and math.isfinite(most):
        first = math.floor(least) + 1 if above else math.ceil(least)
        last = math.ceil(most) - 1 if below else math.floor(most)
        return first > last
    if math.isclose(least, most, rel_tol=_ROUNDED):
        return above or below
    return least > most
