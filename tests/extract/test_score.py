"""F1 of values, and the assignment that makes lists sets."""

from __future__ import annotations

import itertools
import random

import pytest

from alignpro.extract.check import read_leaf
from alignpro.extract.schema import read_schema
from alignpro.extract.score import FieldScore, best_assignment, score_record

TEN = read_schema({"fields": {f"f{n}": "text" for n in range(10)}})
LISTS = read_schema(
    {
        "fields": {
            "parts": {"list": {"name": "text", "mass": "quantity[g]"}},
            "tags": {"list": "text"},
        }
    }
)


def parts(*pairs):
    return {"parts": [{"name": name, "mass": mass} for name, mass in pairs]}


def test_the_oracle_of_ten_values():
    gold = {f"f{n}": str(n) for n in range(10)}
    predicted = {f"f{n}": str(n) if n < 8 else "x" for n in range(9)}
    score = score_record(predicted, gold, TEN)
    assert score == FieldScore(8, 9, 10)
    assert score.precision == pytest.approx(0.8889, abs=5e-5)
    assert score.recall == pytest.approx(0.8, abs=1e-12)
    assert score.f1 == pytest.approx(0.8421, abs=5e-5)


def test_a_quantity_is_one_value_in_every_unit():
    for mass in ("1220 mg", "1.22 g", "0.00122 kg", "1,220 mg", "1.22 x 10^-3 kg", 1.22):
        assert score_record(parts(("a", mass)), parts(("a", "1.22 g")), LISTS).f1 == 1.0, mass
    assert score_record(parts(("a", "1.23 g")), parts(("a", "1.22 g")), LISTS).right == 1
    assert score_record(parts(("a", "1.22 mL")), parts(("a", "1.22 g")), LISTS).right == 1


def test_lists_are_sets():
    gold = parts(("a", "1 g"), ("b", "2 g"), ("c", "3 g"))
    for order in itertools.permutations(gold["parts"]):
        assert score_record({"parts": list(order)}, gold, LISTS).f1 == 1.0
    twice = {"parts": [*gold["parts"], gold["parts"][0]]}
    assert score_record(twice, gold, LISTS) == FieldScore(6, 8, 6)
    split = {"parts": [{"name": "a"}, {"mass": "1 g"}, *gold["parts"][1:]]}
    score = score_record(split, gold, LISTS)
    assert score == FieldScore(5, 6, 6) and score.precision < 1 and score.recall < 1
    assert score_record({"tags": ["y", "x"]}, {"tags": ["x", "y"]}, LISTS).f1 == 1.0


def test_each_value_is_read_once_however_many_it_is_compared_with(monkeypatch):
    read = []

    def counted(value, leaf):
        read.append(value)
        return read_leaf(value, leaf)

    monkeypatch.setattr("alignpro.extract.score.read_leaf", counted)
    given = [(f"part {n}", f"{n} mg") for n in range(1, 31)]
    score = score_record(parts(*given), parts(*given[::-1]), LISTS)
    assert score == (60, 60, 60) and len(read) == 120


def test_what_is_empty():
    gold = parts(("a", "1 g"))
    for nothing in ({}, None, {"parts": []}, {"parts": None}):
        assert score_record(nothing, gold, LISTS) == FieldScore(0, 0, 2)
        assert score_record(nothing, gold, LISTS).f1 == 0.0
        assert score_record(nothing, {}, LISTS).f1 == 1.0
    assert score_record(gold, {}, LISTS).f1 == 0.0


@pytest.mark.parametrize(
    "value",
    [
        5,
        "text",
        [1],
        {"parts": "a"},
        {"parts": [5, None, [[]]]},
        {"parts": {"name": "a"}},
        {"x": 1},
    ],
)
def test_records_of_another_form_have_nothing_right(value):
    score = score_record(value, parts(("a", "1 g")), LISTS)
    assert score.right == 0 and score.true == 2


def test_what_is_no_field_costs_precision_and_depth_costs_nothing():
    gold = parts(("a", "1 g"))
    assert score_record({**gold, "x": [1, 2]}, gold, LISTS) == FieldScore(2, 4, 2)
    deep: dict = {}
    for _ in range(100_000):
        deep = {"x": deep}
    assert score_record({**gold, "x": deep}, gold, LISTS) == FieldScore(2, 3, 2)


def test_the_assignment_is_the_best_of_all():
    draws = random.Random(5)
    for _ in range(300):
        rows, columns = draws.randint(0, 5), draws.randint(1, 5)
        weights = [[draws.choice((0, 0, 1, 2, 7)) for _ in range(columns)] for _ in range(rows)]
        pairs = best_assignment(weights)
        assert len({r for r, _ in pairs}) == len({c for _, c in pairs}) == min(rows, columns)
        best = 0
        if rows <= columns:
            for chosen in itertools.permutations(range(columns), rows):
                best = max(best, sum(weights[r][c] for r, c in enumerate(chosen)))
        else:
            for chosen in itertools.permutations(range(rows), columns):
                best = max(best, sum(weights[r][c] for c, r in enumerate(chosen)))
        assert sum(weights[r][c] for r, c in pairs) == best


def test_a_large_assignment_agrees_with_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    draws = random.Random(6)
    weights = [[draws.randint(0, 9) for _ in range(70)] for _ in range(40)]
    rows, columns = optimize.linear_sum_assignment(weights, maximize=True)
    theirs = sum(weights[r][c] for r, c in zip(rows, columns, strict=True))
    assert sum(weights[r][c] for r, c in best_assignment(weights)) == theirs
