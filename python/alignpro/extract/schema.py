"""A schema: the fields of a record, their types, and the checks that a right record passes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

from alignpro.extract.expression import OPERATORS, compile_check
from alignpro.extract.kinds import NUMERIC, FieldType, Kind, Leaf, ListOf, Object, Path, find
from alignpro.extract.parse import RepeatedKeyError, read_json
from alignpro.extract.ranges import check_possible
from alignpro.extract.terms import Term
from alignpro.extract.units import (
    PERCENT,
    PLAIN,
    UNIT_NAMES,
    Unit,
    comparable,
    dimension_name,
    find_unit,
)
from alignpro.types import not_unicode, type_name

Format = Literal["json", "lines"]
FORMATS = ("json", "lines")
PACKAGED = ("reaction", "reaction_flat", "recipe", "meeting")
_DEEPEST = 8  # objects and lists in each other
_MOST_BYTES = 2**20
_SHOWN = 120  # characters of a check in an error
_SHORT = re.compile(r"([a-z]+)(?:\[([^\[\]]*)\])?(\?)?")
_KINDS: tuple[Kind, ...] = ("text", "formula", "number", "integer", "boolean", "quantity")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
_PLACE = "{prompt}"
_LONG_FORMS = {
    "type": ("optional", "min", "max", "grounded", "description"),
    "enum": ("optional", "description"),
    "list": ("min", "max", "description"),
    "object": ("optional", "description"),
}


class SchemaError(ValueError):
    """A schema that is none: one line that names the field, what was expected and what came."""


@dataclass(frozen=True)
class Check:
    """One of a schema's checks. Its first field is the one that a violation is of."""

    text: str
    term: Term
    unit: Unit | None = None  # of that field

    @property
    def is_of_one_field(self) -> bool:
        return len(self.term.fields) == 1


@dataclass(frozen=True)
class Schema:
    """What a record holds; `read_schema` makes one."""

    name: str
    root: Object
    checks: tuple[Check, ...] = ()
    examples: tuple[tuple[str, dict[str, Any]], ...] = ()  # texts, and their records
    description: str = ""

    def template(self, form: Format = "json") -> str:
        """What a model reads to extract a record, in which {prompt} stands for the text."""
        from alignpro.extract.describe import template

        return template(self, form)

    def write(self, record: Mapping[str, Any], form: Format = "json") -> str:
        """A record as a model is to write it."""
        from alignpro.extract.describe import write_record

        return write_record(self, record, form)


def read_schema(source: str | FilePath | Mapping[str, Any] | Schema) -> Schema:
    """A schema from a file of JSON, the name of a packaged one, or what such a file holds.

    ``{"name": ..., "fields": {...}, "checks": [...], "examples": [{"text", "record"}]}``; types and
    checks are as in docs/extraction.md.

    Raises:
        SchemaError: what is no schema. FileNotFoundError: there is no such file.
    """
    if isinstance(source, Schema):
        return source
    if isinstance(source, Mapping):
        return _read(source, "schema")
    if not isinstance(source, (str, FilePath)):
        raise SchemaError(f"schema: expected a file or a mapping, got {type_name(source)}")
    path = FilePath(source)
    if str(source) in PACKAGED and not path.exists():
        path = FilePath(__file__).parent / "schemas" / f"{source}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"schema {str(source)!r}: no such file; the package's own are {', '.join(PACKAGED)}"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise SchemaError(f"{source}: expected at most {_MOST_BYTES} bytes")
    try:
        value = read_json(path.read_text("utf-8-sig"))
    except RepeatedKeyError as error:
        raise SchemaError(f"{source}: key {error.key!r} appears twice in an object") from None
    except ValueError as error:
        raise SchemaError(f"{source}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise SchemaError(f"{source}: expected an object, got {type_name(value)}")
    return _read(value, str(source))


def _read(value: Mapping[str, Any], where: str) -> Schema:
    if "fields" not in value and {"$ref", "$schema", "properties", "type"} & set(value):
        raise SchemaError(
            f"{where}: JSON Schema is another language; expected types by name, as in "
            '{"fields": {"title": "text", "year": "integer?", "kind": ["book", "film"]}} '
            "(docs/extraction.md)"
        )
    known = ("name", "description", "fields", "checks", "examples")
    _check_keys(value, known, where)
    if "fields" not in value:
        raise SchemaError(f"{where}: expected 'fields', an object of names and types")
    name = _text(value.get("name", "record"), f"{where}: name")
    root = _object(value["fields"], f"{where}: fields", 0)
    checks = []
    for index, text in enumerate(_listed(value.get("checks", []), f"{where}: checks")):
        place = f"{where}: checks[{index}]"
        shown = _text(text, place)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        try:
            term = compile_check(text, root)
            checks.append(Check(text, term, _unit_of(root, term.fields[0])))
        except SchemaError:
            raise
        except (ValueError, RecursionError) as error:
            said = error if isinstance(error, ValueError) else "it is nested too deeply"
            raise SchemaError(f"{place} ({shown}): {said}") from None
    try:
        check_possible(root, [bound for check in checks for bound in check.term.bounds])
    except ValueError as error:
        raise SchemaError(f"{where}: {error}") from None
    description = _text(value.get("description", ""), f"{where}: description", empty=True)
    schema = Schema(name, root, tuple(checks), (), description)
    examples = []
    for index, row in enumerate(_listed(value.get("examples", []), f"{where}: examples")):
        examples.append(_example(schema, row, f"{where}: examples[{index}]"))
    return Schema(name, root, schema.checks, tuple(examples), description)


def _unit_of(root: Object, path: Path) -> Unit | None:
    found, _ = find(root, path)
    of = found.item if isinstance(found, ListOf) else found
    return of.unit if isinstance(of, Leaf) else None


def _example(schema: Schema, row: Any, where: str) -> tuple[str, dict[str, Any]]:
    from alignpro.extract.check import verify

    if not isinstance(row, Mapping) or set(row) != {"text", "record"}:
        raise SchemaError(f"{where}: expected an object with 'text' and 'record'")
    text, record = _text(row["text"], f"{where}.text"), row["record"]
    _text(json.dumps(record, ensure_ascii=False, default=str), f"{where}.record")
    wrong = verify(record, schema, text)
    if wrong:
        raise SchemaError(f"{where}.record: {wrong[0]}")
    return text, dict(record)


# Types


def _type(value: Any, where: str, depth: int) -> FieldType:
    if depth > _DEEPEST:
        raise SchemaError(f"{where}: expected at most {_DEEPEST} objects and lists in each other")
    if isinstance(value, str):
        return _short(value, where)
    if isinstance(value, (list, tuple)):
        return Leaf("choice", choices=_choices(value, where))
    if not isinstance(value, Mapping):
        raise SchemaError(
            f'{where}: expected a type such as "text", a list of choices or an object of fields, '
            f"got {type_name(value)}"
        )
    form = next((key for key in _LONG_FORMS if key in value), None)
    return _object(value, where, depth) if form is None else _long(form, value, where, depth)


def _object(value: Any, where: str, depth: int) -> Object:
    if not isinstance(value, Mapping):
        raise SchemaError(f"{where}: expected an object of names and types, got {type_name(value)}")
    if not value:
        raise SchemaError(f"{where}: expected at least one field, got none")
    fields = {}
    for name, inner in value.items():
        place = f"{where}.{name}" if isinstance(name, str) else where
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SchemaError(
                f"{where}: expected names of letters, digits and _, a letter first, got {name!r}"
            )
        if name in OPERATORS:
            raise SchemaError(f"{place}: {name!r} is a word of the checks' language; rename it")
        fields[name] = _type(inner, place, depth + 1)
    return Object(fields)


def _short(text: str, where: str, **more: Any) -> Leaf:
    match = _SHORT.fullmatch(text.strip())
    kind = next((k for k in _KINDS if match is not None and match[1] == k), None)
    if match is None or kind is None:
        raise SchemaError(
            f"{where}: unknown type {text[:40]!r}; there are {', '.join(_KINDS)} (with its unit, "
            'quantity[g]), number[%], a list of choices, {"list": TYPE} and {NAME: TYPE}; "?" '
            "behind a type: it may be absent"
        )
    unit = None
    if match[2] is not None:
        unit = find_unit(match[2])
        if unit is None or kind not in ("number", "quantity"):
            raise SchemaError(
                f"{where}: {text[:40]!r}: expected quantity[UNIT] or number[%]; units are "
                f"{', '.join(UNIT_NAMES)}"
            )
        if (kind == "quantity") == (unit.dimension == PLAIN):
            raise SchemaError(
                f"{where}: {text[:40]!r}: a quantity has a unit, a number may have {PERCENT}"
            )
    elif kind == "quantity":
        raise SchemaError(f"{where}: expected the unit of a quantity, such as quantity[g]")
    grounded = more.pop("grounded", kind in ("text", "formula"))
    optional = more.pop("optional", False) or bool(match[3])
    return Leaf(kind, unit, optional=optional, grounded=grounded, **more)


def _long(form: str, value: Mapping[str, Any], where: str, depth: int) -> FieldType:
    allowed = (form, *_LONG_FORMS[form])
    unknown = [key for key in value if key not in allowed]
    if unknown:
        raise SchemaError(
            f"{where}: {unknown[0]!r} is no key beside {form!r}; there are {', '.join(allowed)}; "
            f'an object with a field called {form!r} is written {{"object": {{...}}}}'
        )
    described = _text(value.get("description", ""), f"{where}.description", empty=True)
    optional = _flag(value, "optional", where)
    if form == "object":
        return Object(_object(value["object"], where, depth).fields, optional, described)
    if form == "enum":
        choices = _choices(value["enum"], where)
        return Leaf("choice", choices=choices, optional=optional, description=described)
    if form == "list":
        least, most = (_bound(value, key, where, whole=True) for key in ("min", "max"))
        _check_order(least, most, where)
        item = _type(value["list"], f"{where}[]", depth + 1)
        if isinstance(item, ListOf):
            raise SchemaError(f"{where}[]: a list in a list; put it into an object's field")
        if item.optional:
            raise SchemaError(f"{where}[]: what is in a list is not optional; min may be 0")
        return ListOf(item, int(least or 0), None if most is None else int(most), described)
    text = _text(value["type"], f"{where}.type")
    more: dict[str, Any] = {"description": described}
    if "grounded" in value:
        more["grounded"] = _flag(value, "grounded", where)
    least, most = (_bound(value, key, where) for key in ("min", "max"))
    _check_order(least, most, where)
    leaf = _short(text, where, optional=optional, least=least, most=most, **more)
    if leaf.kind not in NUMERIC and (least, most) != (None, None):
        raise SchemaError(f"{where}: min and max are for numbers, got {leaf.kind}")
    if leaf.kind == "boolean" and leaf.grounded:
        raise SchemaError(f"{where}: a boolean does not occur in a text; leave grounded out")
    return leaf


def _choices(value: Any, where: str) -> tuple[str, ...]:
    good = isinstance(value, (list, tuple)) and value
    if not good or not all(isinstance(v, str) and v.strip() for v in value):
        raise SchemaError(f"{where}: expected choices as a list of texts, got {str(value)[:40]!r}")
    for choice in value:
        _text(choice, where)
    if len({comparable(v) for v in value}) < len(value):
        raise SchemaError(f"{where}: a choice appears twice")
    return tuple(value)


def _bound(value: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> float | None:
    given = value.get(key)
    if given is None:
        return None
    good = isinstance(given, int) if whole else isinstance(given, (int, float))
    try:
        number = float(given) if good and not isinstance(given, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (whole and number < 0):
        expected = "a whole number, 0 or more" if whole else "a number"
        raise SchemaError(f"{where}.{key}: expected {expected}, got {repr(given)[:40]}")
    return number


def _check_order(least: float | None, most: float | None, where: str) -> None:
    if least is not None and most is not None and least > most:
        raise SchemaError(f"{where}: min {least:g} is above max {most:g}")


def _flag(value: Mapping[str, Any], key: str, where: str) -> bool:
    given = value.get(key, False)
    if not isinstance(given, bool):
        raise SchemaError(f"{where}.{key}: expected true or false, got {type_name(given)}")
    return given


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise SchemaError(f"{where}: expected a list, got {type_name(value)}")
    return list(value)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        what = "an empty text" if isinstance(value, str) else type_name(value)
        raise SchemaError(f"{where}: expected text, got {what}")
    if _PLACE in value:
        raise SchemaError(f"{where}: {_PLACE} stands for the text that is read, and nowhere else")
    wrong = not_unicode(value)
    if wrong is not None:
        raise SchemaError(f"{where}: {wrong}")
    return value


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        there = ", ".join(known)
        raise SchemaError(f"{where}: unknown key {str(unknown[0])[:40]!r}; there are {there}")


def kind_in_words(leaf: Leaf) -> str:
    """What a field holds, for a model and for errors."""
    if leaf.kind == "choice":
        return "one of " + ", ".join(leaf.choices)
    if leaf.kind == "quantity":
        assert leaf.unit is not None
        return f"{dimension_name(leaf.dimension)} with its unit, such as {leaf.unit.name}"
    if leaf.kind == "number" and leaf.unit is not None:
        return "a percentage"
    return {
        "text": "text", "formula": "a chemical formula", "number": "a number",
        "integer": "a whole number", "boolean": "true or false",
    }[leaf.kind]  # fmt: skip
