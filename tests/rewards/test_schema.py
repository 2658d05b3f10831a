"""The reward of a schema: its parts by hand, and nothing for saying nothing."""

from __future__ import annotations

import json

import pytest

from alignpro.rewards.build import build_reward
from alignpro.rewards.combine import score_components

SCHEMA = {
    "fields": {"name": "text", "mass": "quantity[g]", "half": "quantity[g]", "note": "text?"},
    "checks": ["close(half, mass / 2, 0.01)", "in_text(mass)"],
}
TEXT = "Take 10 g of salt; half of it is 5 g."
GOOD = {"name": "salt", "mass": "10 g", "half": "5 g"}


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "salt.json"
    file.write_text(json.dumps(SCHEMA))
    return f"schema:{file}"


def parts(reward, *answers, **columns):
    count = len(answers)
    written = [a if isinstance(a, str) else json.dumps(a) for a in answers]
    return score_components(reward, [TEXT] * count, [""] * count, written, columns)


def test_the_parts_by_hand(spec):
    reward = build_reward(spec)
    total, by_part = parts(
        reward,
        GOOD,
        {**GOOD, "half": "4 g"},  # its check fails
        {**GOOD, "mass": "11 g"},  # is not in the text: the check between fields is not made
        {"name": "salt", "mass": "10 g"},  # lacks a value
        {**GOOD, "x": 1},
    )
    assert by_part["valid"] == [1.0] * 5
    assert by_part["schema"] == pytest.approx([1, 1, 2 / 3, 2 / 3, 3 / 4])
    assert by_part["checks"] == [1, 0, 0, 0, 1]
    assert total == pytest.approx([1, 2 / 3, 5 / 9, 5 / 9, 11 / 12])


@pytest.mark.parametrize(
    "answer", ["", "{}", "[]", "null", '{"x": 1}', '{"note": ""}', '{"name": null}', "{" * 999]
)
def test_nothing_said_scores_0_in_every_part(spec, answer):
    reward = build_reward(spec)
    total, by_part = parts(reward, answer, record=[GOOD])
    assert total == [0.0] and all(values == [0.0] for values in by_part.values())
    assert set(by_part) == {"valid", "schema", "checks", "f1"}


def test_a_column_of_true_records_adds_f1(spec):
    reward = build_reward({spec: {"valid": 0, "schema": 0, "checks": 1, "f1": 3}})
    total, by_part = parts(reward, GOOD, {**GOOD, "half": "4 g"}, record=[GOOD, json.dumps(GOOD)])
    assert by_part["f1"] == pytest.approx([1, 2 / 3])
    assert total == pytest.approx([1, 0.75 * 2 / 3])
    assert "f1" not in parts(reward, GOOD)[1]
    assert parts(reward, GOOD)[0] == [1.0]
    with pytest.raises(ValueError, match="column 'record', row 0"):
        parts(reward, GOOD, record=[5])


def test_lines_are_a_format_and_so_is_a_weight(spec):
    reward = build_reward(f"{spec}#lines")
    written = "name: salt\nmass: 10 g\nhalf: 5 g"
    assert parts(reward, written, json.dumps(GOOD))[0] == [1.0, 0.0]
    summed = build_reward(f"{spec}#lines+0.5*{spec}")
    assert parts(summed, written)[0] == [1.0]
    assert parts(build_reward("schema:reaction_flat"), GOOD)[0][0] < 0.5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("schema:nowhere.json", "no such file"),
        ("schema:reaction#yaml", "expected json or lines"),
        ({"schema:reaction": {"valid": -1}}, "valid: expected a weight"),
        ({"schema:reaction": {"valid": float("nan")}}, "valid: expected a weight"),
        ({"schema:reaction": {"valid": 0, "schema": 0, "checks": 0}}, "above 0"),
        ({"schema:reaction": {"depth": 1}}, "cannot take"),
    ],
)
def test_what_is_wrong_is_said(spec, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        build_reward(spec)
