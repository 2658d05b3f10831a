"""The verifier: what of a record is not as its schema, its text and arithmetic say it must be.

First every value by itself: its type, unit, choices and range, whether it occurs in the text, and
the checks that name this one field. Then the checks of several fields, where each of them has
passed by itself: a violation is then of the first field that the check names. So one wrong value is
one violation, as long as the text does not hold it somewhere else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from alignpro.extract.arithmetic import at_most
from alignpro.extract.formula import molar_mass
from alignpro.extract.kinds import NUMERIC, FieldType, Leaf, ListOf, Object, Path
from alignpro.extract.schema import Check, Schema, kind_in_words
from alignpro.extract.scope import BAD, NotJudgedError, Scope, UncomputableError, elements, look_up
from alignpro.extract.source import Source
from alignpro.extract.units import (
    PERCENT,
    TEMPERATURE,
    Quantity,
    comparable,
    normalise,
    read_quantity,
)
from alignpro.types import type_name

_SHOWN = 60
_MOST_NAMES = 40
_FLAGS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong. ``field``: a path, the elements of lists counted from 1."""

    field: str
    check: str  # required, type, unit, range, choice, length, repeated, unknown, in_text, empty,
    # parse, or one of the schema's checks
    found: Any = None
    expected: Any = None

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.check}: expected {self.expected}, found {self.found}"


@dataclass
class Verdict:
    """What came of a record. Values and checks are counted for a graded score."""

    violations: list[Violation] = field(default_factory=list)
    right: int = 0  # values that pass by themselves
    wrong: int = 0  # values that do not, are missing or are no field
    passed: int = 0  # checks of several fields, an element of a list at a time
    failed: int = 0
    blocked: int = 0  # not made, since a value is wrong or missing

    @property
    def verified(self) -> bool:
        return not self.violations


def verify(record: Any, schema: Schema, source: str | None = None) -> list[Violation]:
    """What is wrong in a record; nothing, where it is verified. source: the text that it is from;
    None leaves out what is compared with it."""
    return judge(record, schema, source).violations


def judge(record: Any, schema: Schema, source: str | None = None) -> Verdict:
    """As `verify`, with counts."""
    verdict = Verdict()
    if not isinstance(record, Mapping):
        verdict.violations.append(Violation("", "type", _shown(record), "an object"))
        verdict.wrong = 1
        return verdict
    reader = _Reader(verdict, None if source is None else _source(source))
    values = reader.read_object(record, schema.root, "")
    if reader.values == 0 and not verdict.violations:
        verdict.violations.append(Violation("", "empty", "no value", "a value of the text"))
        return verdict
    for check in schema.checks:
        if check.is_of_one_field:
            _make(check, values, reader.source, verdict)
    for check in schema.checks:
        if not check.is_of_one_field:
            _make(check, values, reader.source, verdict)
    return verdict


@functools.lru_cache(maxsize=256)
def _source(text: str) -> Source:
    """Many draws are compared with one text."""
    return Source(text)


class Refused(Exception):
    """A value that is none of its field."""

    def __init__(self, check: str, found: Any, expected: Any) -> None:
        super().__init__(check)
        self.violation = (check, _shown(found), expected)


class _Reader:
    """Values of a record in the base units of their dimensions, `BAD` for those that are none."""

    def __init__(self, verdict: Verdict, source: Source | None) -> None:
        self.verdict, self.source = verdict, source
        self.values = 0  # that there are, of whatever kind

    def read(self, value: Any, of: FieldType, path: str) -> Any:
        if isinstance(of, ListOf):
            return self._read_list(value, of, path)
        if value is None:
            if of.optional:
                return None
            return self._refuse(path, "required", None, _expected(of))
        if isinstance(of, Object):
            if not isinstance(value, Mapping):
                self.values += 1
                return self._refuse(path, "type", _shown(value), "an object")
            return self.read_object(value, of, path)
        self.values += 1
        try:
            read = read_leaf(value, of)
            if of.grounded and self.source is not None and not self.source.spans(read, of):
                raise Refused("in_text", value, "a value that the text holds")
        except Refused as error:
            return self._refuse(path, *error.violation)
        self.verdict.right += 1
        return read

    def read_object(self, value: Mapping[Any, Any], of: Object, path: str) -> dict[str, Any]:
        before = f"{path}." if path else ""
        for name in value:
            if name not in of.fields and value[name] is not None:
                self.values += 1
                there = "one of " + shown_names(of.fields)
                self._refuse(before + str(name)[:_SHOWN], "unknown", _shown(value[name]), there)
        return {n: self.read(value.get(n), t, before + n) for n, t in of.fields.items()}

    def _read_list(self, value: Any, of: ListOf, path: str) -> Any:
        if value is None:
            value = []
        if not isinstance(value, (list, tuple)):
            self.values += 1
            return self._refuse(path, "type", _shown(value), "a list")
        if not value and of.least:
            return self._refuse(path, "required", None, "a list")
        most = math.inf if of.most is None else of.most
        if not of.least <= len(value) <= most:
            self.values += 1
            expected = f"{of.least} to {most:g} elements"
            return self._refuse(path, "length", len(value), expected)
        elements: list[Any] = []
        seen: set[str] = set()
        for number, item in enumerate(value, start=1):
            before = self.verdict.right
            read = self.read(item, of.item, f"{path}.{number}")
            key = _said(read)
            if read is not BAD and key in seen:
                # Or a share of right values could be bought by saying one of them many times.
                self.verdict.right = before
                read = self._refuse(f"{path}.{number}", "repeated", _shown(item), "it once")
            seen.add(key)
            elements.append(read)
        return elements

    def _refuse(self, path: str, check: str, found: Any, expected: Any) -> object:
        self.verdict.violations.append(Violation(path, check, found, expected))
        self.verdict.wrong += 1
        return BAD


def _said(read: Any) -> str:
    """One text for what is one value: in any unit, case and order of its lists."""
    if isinstance(read, dict):
        return repr({name: _said(value) for name, value in read.items()})
    if isinstance(read, list):
        return repr(sorted(map(_said, read)))
    return f"{read:.9g}" if isinstance(read, float) else repr(comparable(read))


def read_leaf(value: Any, leaf: Leaf) -> Any:
    """The value of a field, in base units. Raises Refused."""
    expected = _expected(leaf)
    if leaf.kind == "boolean":
        flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise Refused("type", value, expected)
        return flag
    if leaf.kind in NUMERIC:
        return _read_number(value, leaf, expected)
    if not isinstance(value, str) or not normalise(value):
        raise Refused("type", value, expected)
    if leaf.kind == "choice":
        choice = leaf.choice_of.get(comparable(value))
        if choice is None:
            raise Refused("choice", value, expected)
        return choice
    if leaf.kind == "formula":
        try:
            molar_mass(value)
        except ValueError:
            raise Refused("type", value, expected) from None
    return value


def _read_number(value: Any, leaf: Leaf, expected: str) -> float:
    quantity = _as_quantity(value)
    if quantity is None:
        raise Refused("type", value, expected)
    if quantity.high is not None:
        raise Refused("type", value, f"{expected}, and no range")
    unit = quantity.unit
    if unit is not None:
        plain = leaf.unit is None or leaf.unit.name == PERCENT
        wanted = None if leaf.unit is None else leaf.unit.name
        if unit.dimension != leaf.dimension or (plain and unit.name != wanted):
            raise Refused("unit", value, expected)
    read = quantity.in_base(leaf.unit)
    if not math.isfinite(read):
        raise Refused("type", value, expected)
    if leaf.kind == "integer" and not read.is_integer():
        raise Refused("type", value, expected)
    if leaf.dimension == TEMPERATURE and read < 0:
        raise Refused("range", value, "a temperature of 0 K or more")
    given = read if leaf.unit is None else leaf.unit.of_base(read)
    least = -math.inf if leaf.least is None else leaf.least
    most = math.inf if leaf.most is None else leaf.most
    if not at_most(least, given) or not at_most(given, most):
        raise Refused("range", value, f"{least:g} to {most:g}")
    return read


def _as_quantity(value: Any) -> Quantity | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return read_quantity(value)
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return Quantity(number) if math.isfinite(number) else None


def _expected(of: FieldType) -> str:
    """As a violation says it, which there may be thousands of."""
    if isinstance(of, Leaf) and of.kind == "choice":
        return f"one of {shown_names(of.choices)}"
    return kind_in_words(of) if isinstance(of, Leaf) else "an object"


def shown_names(names: Collection[str]) -> str:
    """All, or the first of many."""
    more = f", ... ({len(names)} in all)" * (len(names) > _MOST_NAMES)
    return ", ".join(itertools.islice(names, _MOST_NAMES)) + more


def _shown(value: Any) -> Any:
    """A value as a violation says it: JSON's own where that is short, else its beginning."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    if isinstance(value, str):
        return value[:_SHOWN]
    if isinstance(value, int):
        return "a whole number beyond 2^53"
    if isinstance(value, (list, tuple, Mapping)):
        return f"{type_name(value)} of {len(value)}"
    return str(value) if isinstance(value, float) else type_name(value)


# Checks


def _make(check: Check, values: Any, source: Source | None, verdict: Verdict) -> None:
    """One check, at every element of its lists."""
    own, term = check.is_of_one_field, check.term
    try:
        scopes = elements(values, source, term.lists)
    except NotJudgedError:
        verdict.blocked += not own
        return
    for scope in scopes:
        try:
            passed, found, expected = bool(term.run(scope)), None, None
            if not passed:
                found, expected = _sides(check, scope)
        except NotJudgedError as error:
            verdict.blocked += error.blocked and not own
            continue
        except UncomputableError as error:
            passed, found, expected = False, str(error), "a number"
        if own and passed:
            continue
        if passed:
            verdict.passed += 1
            continue
        path = term.fields[0]
        verdict.violations.append(Violation(_name(path, scope), check.text, found, expected))
        if not own:
            verdict.failed += 1
            continue
        verdict.wrong += 1
        if len(look_up_lists(path, scope)) == len(term.lists) and _mark(values, path, scope):
            verdict.right -= 1


def look_up_lists(path: Path, scope: Scope) -> list[Path]:
    """The lists of a path at which ``scope`` has an element."""
    return [path[:n] for n in range(1, len(path) + 1) if path[:n] in scope.at]


def _mark(values: Any, path: Path, scope: Scope) -> bool:
    """Refuse the value, for the checks of several fields; False where there is no single one."""
    *before, last = path
    at = look_up(scope, tuple(before)) if before else values
    if not isinstance(at, dict):
        return False
    if isinstance(at[last], list):
        if path not in scope.at:
            return False
        at[last][scope.at[path]] = BAD
    else:
        at[last] = BAD
    return True


def _name(path: Path, scope: Scope) -> str:
    parts: list[str] = []
    for number, name in enumerate(path, start=1):
        parts.append(name)
        if path[:number] in scope.at:
            parts.append(str(scope.at[path[:number]] + 1))
    return ".".join(parts)


def _sides(check: Check, scope: Scope) -> tuple[Any, Any]:
    """What a check found and what it expected, in the unit of its first field where that fits."""
    unit, sides = check.unit, check.term.sides or ()
    if unit is not None and any(term.point is False for term in sides):
        unit = unit._replace(zero=0.0)

    def shown(value: Any, *, in_unit: bool = True) -> Any:
        if isinstance(value, float):
            if unit is not None and in_unit:
                value = unit.of_base(value)
            return float(f"{value:.6g}")  # which is what a reader looks at
        return _shown(value)

    if not sides:
        value = look_up(scope, check.term.fields[0])
        return (None if isinstance(value, (list, dict)) else shown(value)), check.text
    found, expected = (
        shown(term.run(scope), in_unit=unit is not None and term.dimension == unit.dimension)
        for term in sides
    )
    return found, expected
