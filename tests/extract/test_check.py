"""The verifier: oracles by hand, hostile records, and every single corruption at its field."""

# ruff: noqa: RUF001 (characters that look alike are what is tested)

from __future__ import annotations

import copy
import json
import math
import random
import time

import pytest

from alignpro.config import DataConfig
from alignpro.data.load import load_prompts
from alignpro.extract.check import judge, verify
from alignpro.extract.schema import read_schema
from alignpro.extract.source import Source, are_near

WEIGHED = read_schema(
    {
        "fields": {"formula": "formula", "mass": "quantity[g]", "amount": "quantity[mol]"},
        "checks": ["close(amount, mass / molar_mass(formula), 0.02)"],
    }
)
LOOSE = read_schema(
    {
        "fields": {"formula": "formula", "mass": "quantity[g]", "amount": "quantity[mol]"},
        "checks": ["close(amount, mass / molar_mass(formula), 0.4)"],
    }
)


def weighed(amount, mass="1.22 g"):
    return {"formula": "C7H6O2", "mass": mass, "amount": amount}


@pytest.mark.parametrize(
    ("amount", "deviation", "passes_loose"),
    [("12.0 mmol", 0.1675, True), ("15.0 mmol", 0.334, True), ("17.0 mmol", 0.412, False)],
)
def test_the_oracle_of_amounts_that_a_loose_tolerance_lets_pass(amount, deviation, passes_loose):
    (violation,) = verify(weighed(amount), WEIGHED)
    assert violation.field == "amount" and violation.check.startswith("close(")
    assert violation.found == float(amount.split()[0]) / 1000
    assert violation.expected == pytest.approx(0.00998993, abs=1e-8)
    assert abs(violation.found - violation.expected) / violation.found == pytest.approx(
        deviation, abs=5e-4
    )
    assert (verify(weighed(amount), LOOSE) == []) is passes_loose


def test_a_right_amount_passes_in_every_unit():
    for mass in ("1220 mg", "1,220 mg", "0.00122 kg", 1.22, "1.22"):
        for amount in ("9.99 mmol", "0.00999 mol", "9.99 x 10^-3 mol", 0.00999):
            assert verify(weighed(amount, mass), WEIGHED) == [], (mass, amount)


@pytest.mark.parametrize(
    ("mass", "check"),
    [
        ("1.22 mL", "unit"),
        ("1.22 %", "unit"),
        ("1.2-1.3 g", "type"),
        ("about 1.22 g", "type"),
        ("1,22 g", "type"),
        ("", "type"),
        ("heavy", "type"),
        (True, "type"),
        ([1.22], "type"),
        ({"value": 1.22}, "type"),
        (float("nan"), "type"),
        (math.inf, "type"),
        (10**400, "type"),
        ("1e999 g", "type"),
        (None, "required"),
    ],
)
def test_a_wrong_value_is_one_violation_of_its_field(mass, check):
    record = weighed("9.99 mmol", mass)
    (violation,) = verify(record, WEIGHED)
    assert (violation.field, violation.check) == ("mass", check)
    json.dumps(violation.to_plain(), allow_nan=False)
    assert "\n" not in str(violation) and len(str(violation)) < 300


@pytest.mark.parametrize(
    "record", [None, 5, "mass", [], [weighed("9.99 mmol")], float("nan"), object()]
)
def test_what_is_no_record_is_one_violation(record):
    (violation,) = verify(record, WEIGHED)
    assert violation.check == "type" and violation.expected == "an object"
    assert not judge(record, WEIGHED).verified


def test_an_empty_record_is_never_verified():
    optional = read_schema({"fields": {"a": "text?", "b": {"list": "text"}}})
    for record in ({}, {"a": None}, {"b": []}, {"a": None, "b": None}):
        assert [v.check for v in verify(record, optional, "some text")] == ["empty"]
    assert verify({"b": ["some"]}, optional, "some text") == []
    assert {v.field for v in verify({}, WEIGHED)} == {"formula", "mass", "amount"}


def test_unknown_fields_and_deep_ones_are_named_and_cost_nothing():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"x": deep}
    record = {**weighed("9.99 mmol"), "note": deep, 5: "five"}
    assert [(v.field, v.check) for v in verify(record, WEIGHED)] == [
        ("note", "unknown"),
        ("5", "unknown"),
    ]


def test_a_division_by_zero_is_a_violation_and_no_error():
    read = read_schema(
        {"fields": {"a": "number", "b": "number"}, "checks": ["a / b > 1", "a * a * a * a > 0"]}
    )
    (violation,) = verify({"a": 1, "b": 0}, read)
    assert (violation.field, violation.found) == ("a", "division by zero")
    huge = verify({"a": 1e200, "b": 1}, read)
    assert [(v.found, v.expected) for v in huge] == [("a number that is too large", "a number")]


def test_temperatures_have_an_offset_and_a_least():
    read = read_schema(
        {
            "fields": {"t": "quantity[degC]", "u": "quantity[degC]?"},
            "checks": ["t <= quantity(100, 'degC')", "u >= t"],
        }
    )
    assert verify({"t": "373.15 K", "u": "212 °F"}, read) == []
    assert [v.field for v in verify({"t": "374 K"}, read)] == ["t"]
    assert verify({"t": "-273.15 °C"}, read) == []
    (violation,) = verify({"t": "−300 °C"}, read)
    assert (violation.field, violation.check) == ("t", "range")
    (violation,) = verify({"t": "80 °C", "u": "170 degF"}, read)
    assert violation.field == "u" and violation.found == pytest.approx(76.6667, abs=1e-4)
    assert violation.expected == pytest.approx(80.0)


def test_differences_of_temperatures_have_no_offset():
    fields = {"a": "quantity[degC]", "b": "quantity[degF]?", "all": {"list": "quantity[degC]"}}
    hot = {"a": "40 °C", "b": "68 °F", "all": ["10 °C", "30 °C"]}
    for check, found in (
        ("a - b <= quantity(10, 'K')", (20.0, 10.0)),
        ("b - a >= quantity(-10, 'K')", (-36.0, -18.0)),
        ("close(quantity(10, 'K'), abs(b - a), 0.1)", (18.0, 36.0)),
        ("(a + b) / 2 < mean(all)", (30.0, 20.0)),
        ("max(a - b, b - a) < min(quantity(5, 'K'), a - b)", (20.0, 5.0)),
        ("b + (a - b) < b", (104.0, 68.0)),
        ("a < quantity(300, 'K')", (40.0, 26.85)),
    ):
        (violation,) = verify(hot, read_schema({"fields": fields, "checks": [check]}))
        assert (violation.found, violation.expected) == pytest.approx(found)
    for check in (
        "a - b <= quantity(10, 'degC')",
        "a + b < quantity(100, 'degC')",
        "close(a, a - b, 0.1)",
        "max(a, a - b) < a",
        "sum(all) < a",
        "a - b == b",
    ):
        with pytest.raises(ValueError, match=r"a difference is quantity\(5, .K.\)"):
            read_schema({"fields": fields, "checks": [check]})


@pytest.mark.parametrize(("litres", "millilitres"), [(0.1, 100), (0.3, 300), (1.1, 1100)])
def test_orders_and_tolerances_spare_the_rounding_of_units(litres, millilitres):
    """As 0.1 L * 1e-3 is above 100 mL * 1e-6 in floats."""
    fields = {"a": "quantity[L]", "b": "quantity[mL]"}
    record = {"a": f"{litres} L", "b": f"{millilitres} mL"}
    for checks in (["a <= b", "b <= a", "a >= b", "b >= a"], ["close(a, b, 0)", "close(b, a, 0)"]):
        assert verify(record, read_schema({"fields": fields, "checks": checks})) == []
    for check in ("a < b", "b < a", "a > b", "b > a"):
        assert len(verify(record, read_schema({"fields": fields, "checks": [check]}))) == 1
    same = [f"a >= quantity({litres}, 'L')", f"a <= quantity({millilitres}, 'mL')"]
    assert verify(record, read_schema({"fields": fields, "checks": same})) == []
    more = {"a": f"{litres} L", "b": f"{millilitres * 1.1} mL"}
    assert verify(more, read_schema({"fields": fields, "checks": ["close(a, b, 0.1)"]})) == []


def test_thousands_of_choices_and_fields_are_read_in_time_and_named_in_short():
    many = [f"choice {i}" for i in range(20_000)]
    read = read_schema({"fields": {"x": {"list": {"enum": many}}, **dict.fromkeys("abc", "text?")}})
    started = time.process_time()
    assert verify({"x": many[::40]}, read) == []
    assert time.process_time() - started < 2
    wrong = verify({"x": ["none"], **{f"k{i}": 1 for i in range(9)}}, read)
    assert {len(violation.expected) < 700 for violation in wrong} == {True}
    assert wrong[-1].expected.endswith("choice 39, ... (20000 in all)")
    assert wrong[0].expected == "one of x, a, b, c"


def test_ranges_choices_flags_and_whole_numbers():
    read = read_schema(
        {
            "fields": {
                "n": {"type": "integer", "min": 1, "max": 5},
                "kind": ["Wet", "dry"],
                "ok": "boolean",
                "m": {"type": "quantity[g]", "max": 2},
            },
            "checks": ["ok or kind == 'wet'"],
        }
    )
    good = {"n": "5", "kind": "WET", "ok": "no", "m": "2000 mg"}
    assert verify(good, read) == []
    for change, field, check in (
        ({"n": 0}, "n", "range"),
        ({"n": 2.5}, "n", "type"),
        ({"n": "2 g"}, "n", "unit"),
        ({"kind": "moist"}, "kind", "choice"),
        ({"kind": 1}, "kind", "type"),
        ({"ok": "maybe"}, "ok", "type"),
        ({"ok": 1}, "ok", "type"),
        ({"m": "2.01 g"}, "m", "range"),
        ({"kind": "dry"}, "ok", "ok or kind == 'wet'"),
    ):
        assert [(v.field, v.check) for v in verify({**good, **change}, read)] == [(field, check)]


def test_text_has_to_occur_in_the_source_as_whole_words():
    read = read_schema(
        {"fields": {"a": "text", "f": "formula?", "free": {"type": "text?", "grounded": False}}}
    )
    source = "Stir  the Tincture with CO and CuSO4 · 5H2O."
    for value in ("the tincture", "STIR THE", "tincture"):
        assert verify({"a": value, "free": "anything"}, read, source) == []
    for value in ("tin", "inctur", "the mixture", "tincture CO"):
        assert [v.check for v in verify({"a": value}, read, source)] == ["in_text"]
    assert verify({"a": "stir", "f": "CuSO4·5H2O"}, read, source) == []
    assert [v.field for v in verify({"a": "stir", "f": "Co"}, read, source)] == ["f"]
    assert verify({"a": "anything"}, read) == []  # without a source there is nothing to occur in


@pytest.mark.parametrize(
    "check",
    [
        "one_of(tasks.who, people)",
        "close(tasks.share, tasks.hours / sum(tasks.hours), 0.01)",
        "tasks.hours <= count(people)",
    ],
)
def test_what_reads_a_list_whole_reads_it_once_for_all_elements(check):
    fields = {"who": "text", "hours": "number", "share": "number"}
    read = read_schema(
        {"fields": {"people": {"list": "text"}, "tasks": {"list": fields}}, "checks": [check]}
    )

    def seconds(count):
        people = [f"p{number}" for number in range(count)]
        tasks = [{"who": who, "hours": 1, "share": 1 / count} for who in people]
        begun = time.process_time()
        assert verify({"people": people, "tasks": tasks}, read) == []
        return time.process_time() - begun

    few = min(seconds(150) for _ in range(3))
    assert seconds(1500) < 30 * few  # ten times as many; by their squares it was 80 times and more


def test_a_check_against_the_mean_of_its_own_list_is_of_all_elements():
    fields = {"rows": {"list": {"n": "number"}}}
    read = read_schema({"fields": fields, "checks": ["rows.n <= 2 * mean(rows.n)"]})
    record = {"rows": [{"n": n} for n in (1, 2, 20, 3, 21, 4, 5, 0)]}  # the mean is 7
    # The first that is refused takes none of the others' means away.
    assert [v.field for v in verify(record, read)] == ["rows.3.n", "rows.5.n"]


def test_elements_of_lists_are_counted_from_one():
    read = read_schema(
        {
            "fields": {
                "people": {"list": "text", "min": 1, "max": 3},
                "tasks": {"list": {"who": "text", "hours": "number", "days": "number?"}},
            },
            "checks": [
                "one_of(tasks.who, people)",
                "tasks.hours <= 10",
                "tasks.days <= tasks.hours",
                "sum(tasks.hours) <= 12",
                "count(people) <= 2 or count(tasks) >= 1",
            ],
        }
    )
    good = {
        "people": ["Ana", "Ben"],
        "tasks": [{"who": "Ana", "hours": 3}, {"who": "ben", "hours": 9, "days": 1}],
    }
    assert verify(good, read) == []
    changed = copy.deepcopy(good)
    changed["tasks"][1]["who"] = "Cleo"
    assert [v.field for v in verify(changed, read)] == ["tasks.2.who"]
    changed = copy.deepcopy(good)
    changed["tasks"][1]["hours"] = 11
    # Its own check refuses it, so what compares it with others is not made.
    assert [(v.field, v.check) for v in verify(changed, read)] == [
        ("tasks.2.hours", "tasks.hours <= 10")
    ]
    changed["tasks"][1] = {"who": "Ben", "hours": 10, "days": 10.5}
    assert [v.field for v in verify(changed, read)] == ["tasks.hours", "tasks.2.days"]
    assert [v.check for v in verify({**good, "people": []}, read)] == ["required"]
    assert next(v.check for v in verify({**good, "people": ["a"] * 4}, read)) == "length"
    assert [v.field for v in verify({"people": ["a", "b", "c"]}, read)] == ["people"]
    assert [v.field for v in verify({**good, "tasks": {"who": "Ana"}}, read)] == ["tasks"]


def test_what_is_near_is_beside_it_and_not_itself():
    read = read_schema(
        {"fields": {"name": "text", "code": "text", "n": "number"},
         "checks": ["near(name, code, 3)", "near(n, name, 10)"]}
    )  # fmt: skip
    text = "salt (S1) and pepper (P2): 5 g of each, salt first."
    record = {"name": "salt", "code": "S1", "n": 5}
    assert verify(record, read, text) == []
    assert [v.field for v in verify({**record, "code": "P2"}, read, text)] == ["name"]
    assert [v.field for v in verify({**record, "code": "salt"}, read, text)] == ["name"]
    assert [v.field for v in verify({**record, "name": "pepper"}, read, text)] == ["name"]
    assert verify(record, read) == []  # without a source nothing is far


def test_spans_are_near_as_every_pair_of_them_says():
    source = random.Random(2)
    seen = set()
    for _ in range(500):
        ours, theirs = (
            [(b, b + source.randint(1, 4)) for b in source.sample(range(40), source.randint(0, 3))]
            for _ in range(2)
        )
        most = source.randint(0, 9)
        between = [max(x[0] - y[1], y[0] - x[1]) for x in ours for y in theirs]
        expected = any(0 <= count <= most for count in between)
        assert are_near(ours, theirs, most) == expected
        seen.add(expected)
    assert seen == {True, False}
    many = [(place, place + 1) for place in range(0, 400_000, 4)]
    started = time.process_time()
    assert not are_near(many, [(end + 1, end + 2) for _, end in many], 0)
    assert time.process_time() - started < 2


def test_an_element_twice_is_a_violation_and_buys_nothing():
    read = read_schema({"fields": {"parts": {"list": {"name": "text", "n": "integer"}, "max": 50}}})
    good, bad = {"name": "salt", "n": 1}, {"name": "pepper", "n": 2}
    once = judge({"parts": [good, bad]}, read, "salt 1")
    many = judge({"parts": [good, bad, *[{"name": "Salt", "n": "1"}] * 40]}, read, "salt 1")
    assert [(v.field, v.check) for v in many.violations[:2]] == [
        ("parts.2.name", "in_text"),
        ("parts.3", "repeated"),
    ]
    assert (once.right, once.wrong) == (3, 1) and (many.right, many.wrong) == (3, 41)
    assert [v.check for v in verify({"parts": [bad] * 100_000}, read)] == ["length"]


def test_an_element_is_there_twice_in_another_unit_or_order():
    read = read_schema({"fields": {"a": {"list": {"x": "quantity[m]", "y": {"list": "number"}}}}})
    said = [("4.35 m", [1, 2]), ("435 cm", [2, "1e0"]), ("435.01 cm", [1, 2]), ("4.35 m", [1, 3])]
    record = {"a": [{"x": x, "y": y} for x, y in said]}
    assert [(v.field, v.check) for v in verify(record, read)] == [("a.2", "repeated")]


# --- what ships ---

SHIPPED = {
    "reaction": ("reactions", "record"),
    "reaction_flat": ("reactions", "flat"),
    "recipe": ("recipes", "record"),
    "meeting": ("meetings", "record"),
}


def rows(name):
    data, column = SHIPPED[name]
    source = DataConfig(data, split=None, prompt="text")
    return [(row.prompt, row.columns[column]) for row in load_prompts(source)]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_record_verifies(name):
    schema = read_schema(name)
    for text, record in rows(name):
        assert verify(record, schema, text) == [], (text, record)


def leaves(value, path=()):
    """(path, value) of every leaf, the elements of lists counted from 1."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value, start=1):
            yield from leaves(inner, (*path, number))
    else:
        yield path, value


def changed(record, path, value):
    """A copy of the record with another value there; `...` takes the key out."""
    copied = copy.deepcopy(record)
    at = copied
    for step in path[:-1]:
        at = at[step - 1] if isinstance(step, int) else at[step]
    last = path[-1] - 1 if isinstance(path[-1], int) else path[-1]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return copied


def other_digit(value):
    """The same with its first digit another, so that it is far off."""
    text = str(value)
    at = next(i for i, c in enumerate(text) if c in "123456789" or text.startswith("0 "))
    return text[:at] + str(int(text[at]) % 9 + 1) + text[at + 1 :]


def occurs(text, value, leaf):
    """Whether the text says it somewhere, so that no one can know that it is wrong."""
    from alignpro.extract.check import read_leaf

    return bool(Source(text).spans(read_leaf(value, leaf), leaf))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_single_corruption_is_reported_at_exactly_that_field(name):
    from alignpro.extract.kinds import NUMERIC, find
    from alignpro.extract.units import read_quantity

    schema, made = read_schema(name), {}
    for text, record in rows(name)[::4]:
        for path, value in leaves(record):
            leaf, _ = find(schema.root, tuple(p for p in path if isinstance(p, str)))
            leaf = getattr(leaf, "item", leaf)
            field = ".".join(map(str, path))
            corruptions = {}
            if not leaf.optional and isinstance(path[-1], str):
                corruptions["missing"] = ...
            if leaf.kind in ("text", "formula"):
                corruptions["invented"] = "C55H66O77" if leaf.kind == "formula" else "unobtainium"
            if leaf.kind in NUMERIC:
                corruptions["digit"] = other_digit(value)
                if occurs(text, corruptions["digit"], leaf):
                    del corruptions["digit"]
            if leaf.kind == "quantity":
                spelled = str(value).split()[-1]
                wrong = {"g": "mL", "mg": "mL", "kg": "mL"}.get(spelled, "g")
                corruptions["unit"] = str(value).replace(spelled, wrong)
                assert read_quantity(corruptions["unit"]) is not None
            if leaf.kind == "choice":
                corruptions["choice"] = "neither"
            corruptions["type"] = [value]
            for kind, corrupt in corruptions.items():
                found = [v.field for v in verify(changed(record, path, corrupt), schema, text)]
                parent = ".".join(map(str, path[:-1]))
                assert found == [field], (kind, field, corrupt, found, parent, text)
                made[kind] = made.get(kind, 0) + 1
    assert min(made.values()) > 10, made


def test_swapped_roles_of_a_reaction_are_seen():
    schema = read_schema("reaction")
    seen = 0
    for text, record in rows("reaction"):
        first, product = record["reactants"][0], record["product"]
        swapped = copy.deepcopy(record)
        swapped["reactants"][0], swapped["product"] = product, first
        assert "product.amount" in [v.field for v in verify(swapped, schema, text)] or (
            len(record["reactants"]) == 1 and record["yield"].startswith(("97", "98", "99"))
        )
        names = copy.deepcopy(record)
        names["reactants"][0]["name"], names["product"]["name"] = product["name"], first["name"]
        assert [v.field for v in verify(names, schema, text)] == [
            "reactants.1.name",
            "product.name",
        ]
        seen += 1
    assert seen == 300


def test_a_schema_never_runs_python():
    """Every name that reaches the evaluator is a field or one of its functions."""
    import builtins

    for name in dir(builtins):
        with pytest.raises(ValueError):
            read_schema(
                {
                    "fields": {"a": "number"},
                    "checks": [f"{name}(a) == 1"]
                    if name not in ("abs", "max", "min", "sum")
                    else [f"{name}.__self__ == a"],
                }
            )
