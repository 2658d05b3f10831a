"""Schemas: what is read, and what is refused in one line that names the field."""

# ruff: noqa: RUF001 (characters that look alike are what is tested)

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from alignpro.extract.check import verify
from alignpro.extract.schema import PACKAGED, SchemaError, read_schema

FLAT = {
    "mass": "quantity[g]",
    "amount": "quantity[mol]",
    "formula": "formula",
    "yield": "number[%]",
}


def schema(fields=None, checks=(), **more):
    return read_schema({"fields": fields or FLAT, "checks": list(checks), **more})


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_schemas_are_read(name):
    read = read_schema(name)
    assert read.checks and read.root.fields
    for form in ("json", "lines"):
        template = read.template(form)
        assert template.count("{prompt}") == 1 and template.endswith("Text: {prompt}")
        assert all(field in template for field in read.root.fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"a": "texts"}, "fields.a: unknown type 'texts'"),
        ({"a": "quantity"}, "fields.a: expected the unit"),
        ({"a": "quantity[parsec]"}, "fields.a: 'quantity.parsec"),
        ({"a": "quantity[%]"}, "fields.a:"),
        ({"a": "number[g]"}, "fields.a:"),
        ({"a": "text[g]"}, "fields.a:"),
        ({"a": 5}, "fields.a: expected a type"),
        ({"a": None}, "fields.a: expected a type"),
        ({"a": []}, "fields.a: expected choices"),
        ({"a": ["x", "X"]}, "fields.a: a choice appears twice"),
        ({"a": ["x  y", "x\ny"]}, "fields.a: a choice appears twice"),
        ({"a": ["x", 1]}, "fields.a: expected choices"),
        ({"a": ["x", "{prompt}"]}, "fields.a: {prompt} stands for the text"),
        (
            {"a": ["x", "\ud800"]},
            "fields.a: lone surrogate",
        ),
        ({"a": {}}, "fields.a: expected at least one field"),
        ({}, "fields: expected at least one field"),
        ({"a b": "text"}, "expected names of letters"),
        ({"_a": "text"}, "expected names of letters"),
        ({"ｍass": "text"}, "expected names of letters"),
        ({"__class__": "text"}, "expected names of letters"),
        ({"and": "text"}, "fields.and: 'and' is a word"),
        ({"a": {"list": {"list": "text"}}}, r"fields.a\[\]: a list in a list"),
        ({"a": {"list": "text?"}}, r"fields.a\[\]: what is in a list is not optional"),
        ({"a": {"list": "text", "min": 3, "max": 1}}, "fields.a: min 3 is above max 1"),
        ({"a": {"list": "text", "min": -1}}, "fields.a.min"),
        ({"a": {"list": "text", "min": True}}, "fields.a.min"),
        ({"a": {"type": "number", "min": float("nan")}}, "fields.a.min"),
        ({"a": {"type": "number", "max": 10**400}}, "fields.a.max"),
        ({"a": {"type": "text", "min": 1}}, "fields.a: min and max are for numbers"),
        ({"a": {"type": "text", "kind": "x"}}, "fields.a: 'kind' is no key beside 'type'"),
        ({"a": {"type": "boolean", "grounded": True}}, "fields.a: a boolean does not occur"),
        ({"a": {"type": "text", "optional": "yes"}}, "fields.a.optional"),
        ({"a": {"type": "text", "description": "{prompt}"}}, "fields.a.description"),
        ("text", "fields: expected an object"),
    ],
)
def test_a_wrong_field_is_named(fields, said):
    with pytest.raises(SchemaError, match=said) as raised:
        schema(fields) if fields else read_schema({"fields": fields})
    assert "\n" not in str(raised.value)


def test_recursion_and_depth_are_refused():
    endless: dict = {}
    endless["a"] = endless
    with pytest.raises(SchemaError, match="at most 8 objects and lists"):
        read_schema({"fields": endless})
    nested = '{"a":' * 5000 + '"text"' + "}" * 5000
    with pytest.raises(SchemaError, match="nested too deeply"):
        _of_text('{"fields": ' + nested + "}")


def _of_text(text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "s.json"
        file.write_text(text, "utf-8")
        return read_schema(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"fields": {"a": "text", "a": "number"}}', "key 'a' appears twice"),
        ('{"fields": {"a": {"type": "number", "max": NaN}}}', "NaN is no number"),
        ("[]", "expected an object"),
        ("{", "malformed JSON"),
        ('{"fields": {"a": "text"}, "check": []}', "unknown key 'check'"),
        ('{"name": "x"}', "expected 'fields'"),
        ('{"type": "object", "properties": {"a": {"type": "string"}}}', "JSON Schema is another"),
        ('{"$ref": "#"}', r'JSON Schema is another language; expected .*{"fields": {"title"'),
        (
            json.dumps({"fields": {"a": "number"}, "checks": ["(" * 5000]}),
            r"\(\.\.\.\): expected at",
        ),
        ('{"fields": {"a": "text"}, "checks": "a"}', "checks: expected a list"),
        ('{"fields": {"a": "text"}, "checks": [1]}', r"checks\[0\]: expected text"),
        ('{"fields": {"a": "text"}, "examples": [{"text": "x"}]}', r"examples\[0\]: expected"),
        (
            '{"fields": {"a": "text"}, "examples": [{"text": "x", "record": {"a": "y"}}]}',
            r"examples\[0\].record: a: in_text",
        ),
        (
            '{"fields": {"a": {"type": "text", "grounded": false}}, '
            '"examples": [{"text": "x", "record": {"a": "{prompt}"}}]}',
            r"examples\[0\].record: {prompt} stands for the text",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text, said):
    with pytest.raises(SchemaError, match=said) as raised:
        _of_text(text)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_names_the_packaged_ones():
    with pytest.raises(FileNotFoundError, match="reaction_flat"):
        read_schema("mine.json")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("__import__('os').system('true') == 0", "no function"),
        ("mass.__class__ == 1", "no field 'mass.__class__'"),
        ("(lambda: 1)() > 0", "is no check"),
        ("[x for x in mass] == 1", "is no check"),
        ("[mass] == 1", "List is no part of a check"),
        ("mass[0] > 0", "Subscript is no part"),
        ("f'{mass}' == 'a'", "JoinedStr is no part"),
        ("mass if amount else 1", "IfExp is no part"),
        ("(x := 5) > 4", "NamedExpr is no part"),
        ("mass ** 9 > 1", "Pow is no operation"),
        ("mass % 2 == 0", "Mod is no operation"),
        ("~mass > 1", "Invert is no operation"),
        ("mass; mass", "is no check"),
        ("import os", "is no check"),
        ("", "expected text, got an empty text"),
        ("mass > 0 #\n and", "is no check"),
        ("mas > 0", "no field 'mas'.*did you mean \"mass\""),
        ("mass.x > 0", "mass has no fields"),
        ("eval(mass) > 0", "no function 'eval'"),
        ("close > 0", "close is a function"),
        ("close(mass, amount, 0.1)", "a mass and an amount of substance do not compare"),
        ("mass > 5", r"a mass and a plain number do not compare; .*quantity\(5"),
        ("mass + amount > mass", r"\+: a mass and an amount"),
        ("mass > quantity(5, 'mL')", "a mass and a volume do not compare"),
        ("mass > quantity(5, 'parsec')", "expected a unit"),
        ("mass > quantity(amount, 'g')", "expected a number as it is"),
        ("molar_mass(mass) > 1", "expected a field of type formula"),
        ("formula > 1", "a formula and a plain number"),
        ("formula < 'C'", "have no order"),
        ("mass", "expected a comparison, got a mass"),
        ("1 < 2", "it names no field"),
        ("close(mass, mass)", "close: expected 3 values, got 2"),
        ("close(mass, mass, tolerance=1)", "no keywords"),
        ("close(*mass)", r"no keywords and no \*"),
        ("close(mass, mass, -1)", "expected 0 or more"),
        ("sum(mass) > mass", "sum of one value"),
        ("count(mass) > 1", "count: expected a list"),
        ("mass in mass", "In is no comparison"),
        ("mass is mass", "Is is no comparison"),
        ("not mass", "not: expected a comparison"),
        ("mass and amount", "and, or: expected comparisons"),
        ("yield < 1" + "0" * 400, "a float holds"),
        ("yield < 1e999", "a float holds"),
        ("yield < True", "expected a number or a text"),
        ("yield < 1j", "expected a number or a text"),
        ("yield < ...", "expected a number or a text"),
        ("-" * 300 + "yield < 1", "nested too deeply"),
        ("(" * 250 + "yield" + ")" * 230 + " < 1", "is no check|nested"),
        ("yield < " + "1 + " * 200 + "1", "expected at most 500 characters"),
        ("formula == 'a\\x41'", "no backslash"),
        ("yield < 1\0", "is no check"),
        ("mass / 0 > mass", "division by zero, whatever the record: mass / 0"),
        ("yield > 0 or 1 / (2 - 2) > 0", r"division by zero, whatever the record: 1 / \(2 - 2\)"),
        ("yield / (3 * 0) > 1", r"division by zero, whatever the record: yield / \(3 \* 0\)"),
        ("mass > quantity(1 / 0, 'g')", "division by zero, whatever the record"),
        ("yield < 1e200 * 1e200", "too large, whatever the record"),
    ],
)
def test_a_wrong_check_is_refused_when_the_schema_is_read(check, said):
    with pytest.raises(SchemaError, match=said) as raised:
        schema(checks=["mass > quantity(0, 'g')", check])
    assert "checks[1]" in str(raised.value) and len(str(raised.value)) < 1500


def test_fields_may_be_called_like_functions_and_words_of_python():
    fields = {name: "number" for name in ("min", "close", "yield", "class", "lambda", "print")}
    read = schema(
        fields,
        [
            "close(min, close + yield, 0.1)",
            "class < lambda",
            "min(min, print) >= 0",
            "'yield' == 'x' or yield > 0",
        ],
    )
    record = {"min": 3, "close": 1, "yield": 2, "class": 1, "lambda": 2, "print": 0}
    assert verify(record, read) == []
    assert [v.field for v in verify({**record, "class": 5}, read)] == ["class"]


def test_elements_of_two_lists_do_not_pair():
    fields = {"a": {"list": {"x": "number"}}, "b": {"list": {"y": "number"}}}
    with pytest.raises(SchemaError, match="a and b are of two lists; sum"):
        schema(fields, ["a.x < b.y"])
    assert schema(fields, ["sum(a.x) < sum(b.y)", "a.x < max(b.y)"]).checks


def test_examples_are_shown_in_the_template():
    read = schema(
        {"who": "text", "when": "text?"},
        examples=[{"text": "Ana came.", "record": {"who": "Ana"}}],
    )
    assert 'Text: Ana came.\n\nRecord:\n{"who": "Ana"}\n\nText: {prompt}' in read.template("json")
    assert "Record:\nwho: Ana\n\nText" in read.template("lines")


def test_a_record_is_written_in_the_order_of_the_schema():
    read = read_schema("meeting")
    record = {
        "actions": [{"what": "eat", "who": "Ana", "due": None}],
        "attendees": ["Ana", "Ben"],
        "title": "lunch",
        "decisions": [],
    }
    assert read.write(record, "lines") == (
        "title: lunch\nattendees.1: Ana\nattendees.2: Ben\nactions.1.who: Ana\nactions.1.what: eat"
    )
    assert json.loads(read.write(record)) == {
        "title": "lunch",
        "attendees": ["Ana", "Ben"],
        "actions": [{"who": "Ana", "what": "eat"}],
    }


@pytest.mark.parametrize(
    ("field", "checks", "said"),
    [
        ("number", ["x > 5", "x < 3"], "no value of x passes x > 5 and x < 3"),
        ("number?", ["x > 5 and 5 >= x"], "no value of x passes x > 5 and 5 >= x"),
        ("number", ["5 < x < 3"], "no value of x passes 5 < x < 3"),
        ("integer", ["3 < x", "x < 4"], "no value of x passes 3 < x and x < 4"),
        ("number", ["x == 2", "x == 2.1"], "no value of x passes x == 2.1 and x == 2"),
        ({"type": "number", "max": 4}, ["x >= 2 + 3"], r"x passes x >= 2 \+ 3 and its max 4"),
        ("quantity[g]", ["x > quantity(1, 'kg')", "x < quantity(999, 'g')"], "no value of x"),
        ("quantity[degC]", ["x < quantity(-300, 'degC')"], "passes 0 K and x < quantity"),
        ({"type": "quantity[degC]", "max": -300}, [], "passes 0 K and its max -300"),
        ({"list": {"type": "integer", "min": 1.2, "max": 1.8}}, [], "its min 1.2 and its max 1.8"),
        ({"list": "number"}, ["x > 1", "x < -1"], "no value of x passes x > 1 and x < -1"),
        ({"list": {"y": "number"}}, ["x.y > 1", "x.y < 0"], "no value of x.y passes"),
    ],
)
def test_checks_that_no_value_passes_are_refused(field, checks, said):
    with pytest.raises(SchemaError, match=f"^schema: .*{said}"):
        schema({"x": field}, checks)


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        (["x > y", "y > x"], "no values of y and x pass y > x and x > y"),
        (["x > y", "y > z", "z > x"], "no values of y and z and x pass y > z and z > x and x > y"),
        (["x > y > z > x"], "no values of y and z and x pass x > y > z > x"),
        (["x == y", "y >= z", "x < z"], "no values of .* pass .*x < z"),
        (["x < x"], "no value of x passes x < x"),
        (
            ["x > y", "y > z", "z >= 1", "1 >= x"],
            " pass x > y and y > z and z >= 1 and 1 >= x",
        ),
        (["x < y < 3", "x > 5"], "no values of y and x pass x < y < 3 and x > 5"),
        (["mass > 10 * quantity(1, 'g')", "mass < z.mass", "z.mass < quantity(9, 'g')"], "no val"),
        (["list.x > list.y", "y > list.x", "list.y > y"], "no values of"),
    ],
)
def test_checks_that_no_values_pass_together_are_refused(checks, said):
    fields = {"x": "number", "y": "number?", "z": "number", "mass": "quantity[kg]"}
    fields["list"] = {"list": {"x": "number", "y": "number"}}
    if "mass" in checks[0]:
        fields["z"] = {"mass": "quantity[g]"}
    with pytest.raises(SchemaError, match=f"^schema: .*{said}"):
        schema(fields, checks)


def test_orders_are_refused_where_no_values_have_them():
    """Against every triple of eighths, which is fine enough for any order of three."""
    axis = np.arange(-16, 17) / 8
    values = dict(zip("xyz", np.meshgrid(axis, axis, axis), strict=True))
    source = random.Random(5)
    refused = 0
    for _ in range(300):
        checks = []
        for _ in range(source.randint(2, 6)):
            one, other = source.sample("xyz", 2)
            right = other if source.random() < 0.7 else source.randint(-1, 1)
            checks.append(f"{one} {source.choice(['<', '<=', '>', '>='])} {right}")
        passes = np.logical_and.reduce([eval(check, {}, values) for check in checks]).any()
        try:
            schema(dict.fromkeys("xyz", "number"), checks)
        except SchemaError:
            refused += 1
            assert not passes, checks
        else:
            assert passes, checks
    assert 80 < refused < 220


def test_many_orders_are_read_in_time():
    names = [f"f{i}" for i in range(400)]
    checks = [f"{b} > {a}" for a, b in itertools.pairwise(names)]
    started = time.process_time()
    schema(dict.fromkeys(names, "number"), checks[::-1])
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "checks",
    [
        ["x > 5 or y > 1", "x < 3"],
        ["not x > 5", "x < 3"],
        ["x != 3", "3 <= x <= 3"],
        ["x < y < 3 or x > 6", "x > 5"],
        ["x <= y", "y <= x"],
        ["x < y + 1", "y < x"],
        ["abs(x) > 5", "x < 3"],
        ["x + 5 > 5", "x < 0.1"],
        ["present(x)", "x > 0"],
    ],
)
def test_checks_that_may_pass_are_not(checks):
    assert len(schema({"x": "number", "y": "number?"}, checks).checks) == len(checks)


def test_what_is_refused_is_what_no_value_passes():
    """Against the verifier, on every value that could pass: between whole numbers lie halves, and
    beside them what its tolerances let through."""
    source = random.Random(3)
    near = (0.0, 5e-13, -5e-13, 5e-10, -5e-10)
    grid = [x / 2 * (1 + d) for x in range(-9, 10) for d in near]
    refused = 0
    for _ in range(400):
        ends = sorted(source.choices(range(-3, 4), k=2)) if source.random() < 0.5 else None
        field = {"type": source.choice(["number", "integer"])}
        field |= dict(zip(("min", "max"), ends, strict=True)) if ends else {}
        signs = source.choices(("<", "<=", ">", ">=", "=="), k=source.randint(1, 3))
        checks = [
            source.choice([f"x {sign} {c}", f"{c} {sign} x"])
            for sign, c in zip(signs, source.choices(range(-3, 4), k=3), strict=False)
        ]
        alone = [schema({"x": field})]  # a check by itself may be against min and max
        alone += [schema({"x": {"type": field["type"]}}, [check]) for check in checks]
        passes = any(all(not verify({"x": x}, one) for one in alone) for x in grid)
        try:
            schema({"x": field}, checks)
        except SchemaError:
            refused += 1
            assert not passes, (field, checks)
        else:
            assert passes, (field, checks)
    assert 100 < refused < 300
