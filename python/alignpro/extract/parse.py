"""From what a model wrote to a record: strict JSON, or a line for each field."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from alignpro.types import type_name

_LONGEST = 2**20  # characters of an answer
_DEEPEST = 64
_LONGEST_LIST = 1000  # of the lines' numbers: a list is as long as its highest


class RepeatedKeyError(ValueError):
    """A key that an object has twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key[:40]!r} appears twice in an object")
        self.key = key


class Parsed(NamedTuple):
    """``record`` is None where there is none, and ``problem`` then says why."""

    record: dict[str, Any] | None
    problem: str = ""


def read_json(text: str) -> Any:
    """Strict JSON: no key twice, no NaN, no number that a float cannot hold.

    Raises ValueError (RepeatedKeyError), one line.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON")

    def whole(digits: str) -> int | float:
        # An integer of thousands of digits takes Python quadratic time, and is no measurement.
        return int(digits) if len(digits) <= 300 else refuse(f"a number of {len(digits)} digits")

    def real(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits[:40])

    number: dict[str, Any] = {"parse_constant": refuse, "parse_int": whole, "parse_float": real}
    try:
        return json.loads(text, object_pairs_hook=_distinct, **number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise RepeatedKeyError(key)
        values[key] = value
    return values


def parse_json(text: str) -> Parsed:
    """The JSON object of an answer. One repair: what stands around the first balanced object (a
    sentence, a fence of code) is left out. The object itself is taken as it is, or not at all.
    """
    if len(text) > _LONGEST:
        return Parsed(None, f"{len(text)} characters, more than {_LONGEST}")
    found = first_object(text)
    if found is None:
        return Parsed(None, "no JSON object" if "{" not in text else "the object does not end")
    try:
        value = read_json(found)
    except ValueError as error:
        return Parsed(None, f"malformed JSON: {error}")
    return Parsed(value)


def first_object(text: str) -> str | None:
    """From the first "{" to the "}" that closes it; None where there is none."""
    begin = text.find("{")
    depth, quoted, escaped = 0, False, False
    for index in range(begin, len(text)) if begin >= 0 else ():
        char = text[index]
        if quoted:
            quoted, escaped = char != '"' or escaped, char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char == "{":
            depth += 1
            if depth > _DEEPEST:
                return text[begin:]  # which the reader refuses
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[begin : index + 1]
    return None


def parse_lines(text: str) -> Parsed:
    """The record of an answer that has a line for each field: ``mass: 1.22 g``,
    ``reactants.2.name: ethanol`` (the second of a list, counted from 1).

    A line without a colon says nothing. A path twice, one that is a value and an object in one, or
    a list that leaves an element out is no record.
    """
    if len(text) > _LONGEST:
        return Parsed(None, f"{len(text)} characters, more than {_LONGEST}")
    tree: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        path, colon, value = line.partition(":")
        path, value = path.strip().lstrip("-* ").strip("`* "), value.strip()
        if not colon or not path or not value:
            continue
        names = path.split(".")
        if len(names) > _DEEPEST:
            return Parsed(None, f"line {number}: nested too deeply")
        at = tree
        for name in names[:-1]:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                return Parsed(None, f"line {number}: {path[:40]!r} is in what is a value")
        if names[-1] in at:
            return Parsed(None, f"line {number}: {path[:40]!r} appears twice")
        at[names[-1]] = value
    if not tree:
        return Parsed(None, "no line with a field and its value")
    try:
        return Parsed({name: _with_lists(value, name) for name, value in tree.items()})
    except ValueError as error:
        return Parsed(None, str(error))


def _with_lists(value: Any, path: str) -> Any:
    """Objects whose keys are 1, 2, ... as lists."""
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(item, f"{path}.{name}") for name, item in value.items()}
    numbered = [name for name in inner if name.isascii() and name.isdigit()]
    if not numbered:
        return inner
    count = len(inner)
    if count > _LONGEST_LIST or set(inner) != {str(n) for n in range(1, count + 1)}:
        raise ValueError(f"{path[:40]!r}: expected the numbers 1, 2, ... of a list without a gap")
    return [inner[str(n)] for n in range(1, count + 1)]


def as_record(value: Any) -> dict[str, Any]:
    """A record of a data set: an object, or the text of one, as a table holds it.

    Raises ValueError.
    """
    if isinstance(value, str):
        value = read_json(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected a record, got {type_name(value)}")
    return value
