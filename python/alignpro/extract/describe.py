"""What a model is told of a schema, and how a record is written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from alignpro.extract.kinds import FieldType, Leaf, ListOf, Object
from alignpro.extract.schema import Format, Schema, kind_in_words

_HOW = {
    "json": "Extract a record from the text, as one JSON object with these fields, and nothing "
    "else.",
    "lines": 'Extract a record from the text, one line for each field, as "field: value", and '
    "nothing else.",
}
_RULE = (
    "Copy words and numbers from the text, numbers with their units. Leave out what the text does "
    "not say."
)
_COUNTED = {
    "json": "",
    "lines": ' The elements of a list are counted: "{0}.1", "{0}.2" and so on.',
}


def template(schema: Schema, form: Format) -> str:
    """The turn that a model reads; {prompt} stands for the text."""
    first_list = next((n for n, t in schema.root.fields.items() if isinstance(t, ListOf)), None)
    counted = "" if first_list is None else _COUNTED[form].format(first_list)
    head = " ".join(filter(None, (schema.description, _HOW[form], _RULE))) + counted
    fields = "\n".join(_lines(schema.root, 0))
    shown = "".join(
        f"Text: {text}\n\nRecord:\n{write_record(schema, record, form)}\n\n"
        for text, record in schema.examples
    )
    return f"{head}\n\n{fields}\n\n{shown}Text: {{prompt}}"


def _lines(root: Object, depth: int) -> Iterator[str]:
    for name, of in root.fields.items():
        inner = of.item if isinstance(of, ListOf) else of
        what = kind_in_words(inner) if isinstance(inner, Leaf) else "an object"
        if isinstance(of, ListOf):
            what = f"a list of {what}" if isinstance(inner, Leaf) else "a list of objects"
        said = _described(of) or _described(inner)
        line = f"{'  ' * depth}- {name}: {what}" + (f" ({said})" if said else "")
        yield line + (", if the text says it" if of.optional else "")
        if isinstance(inner, Object):
            yield from _lines(inner, depth + 1)


def _described(of: FieldType) -> str:
    return " ".join(of.description.split())


def write_record(schema: Schema, record: Mapping[str, Any], form: Format) -> str:
    """Its fields in the schema's order; what is null or empty is left out."""
    ordered = _ordered(schema.root, record)
    if form == "json":
        return json.dumps(ordered, ensure_ascii=False)
    return "\n".join(f"{path}: {value}" for path, value in _flat(ordered, ""))


def _ordered(of: FieldType, value: Any) -> Any:
    if isinstance(of, ListOf) and isinstance(value, list):
        return [_ordered(of.item, item) for item in value]
    if isinstance(of, Object) and isinstance(value, Mapping):
        inner = {n: _ordered(t, value[n]) for n, t in of.fields.items() if n in value}
        return {n: v for n, v in inner.items() if v is not None and v != []}
    return value


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(number), item) for number, item in enumerate(value, start=1))
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield path, " ".join(text.split())
    for name, inner in items:
        yield from _flat(inner, f"{path}.{name}" if path else name)
