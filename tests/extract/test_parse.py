"""From what a model wrote to a record."""

from __future__ import annotations

import pytest

from alignpro.extract.parse import as_record, parse_json, parse_lines


def test_what_stands_around_the_first_object_is_left_out():
    for text in ('{"a": 1}', 'Sure: ```json\n{"a": 1}\n``` {"a": 2}', '{"a": 1} {"b": 2}'):
        assert parse_json(text).record == {"a": 1}
    assert parse_json('x {"a": "}{\\"}", "b": {}} y').record == {"a": '}{"}', "b": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"a": 1', "does not end"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": [-1e400]}', "-1e400 is no number"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ("{'a': 1}", "malformed JSON"),
        ('{"a": 1,}', "malformed JSON"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply|malformed"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("{" * 100_000, "malformed"),
        ('{"a": "' + "x" * 2**20 + '"}', "characters, more than"),
    ],
)
def test_what_is_no_record_says_why_in_one_line(text, said):
    import re

    record, problem = parse_json(text)
    assert record is None and re.search(said, problem) and "\n" not in problem
    assert len(problem) < 200


def test_lines_hold_objects_and_lists_by_their_paths():
    text = """Here it is
- mass: 1.22 g
**note**: at 10:30
reactants.2.name: b
reactants.1.name: a
empty:
"""
    assert parse_lines(text).record == {
        "mass": "1.22 g",
        "note": "at 10:30",
        "reactants": [{"name": "a"}, {"name": "b"}],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no line"),
        ("a\nb", "no line"),
        ("a: 1\na: 2", "line 2: 'a' appears twice"),
        ("a: 1\na.b: 2", "is in what is a value"),
        ("a.b: 1\na: 2", "appears twice"),
        ("a.1: x\na.3: y", "without a gap"),
        ("a.0: x", "without a gap"),
        ("a.1: x\na.b: y", "without a gap"),
        ("a.999999999999: x", "without a gap"),
        (".".join("a" * 1000) + ": x", "nested too deeply"),
        ("a.٢: x\na.1: y", "without a gap"),
    ],
)
def test_lines_that_are_no_record(text, said):
    record, problem = parse_lines(text)
    assert record is None and said in problem


def test_a_column_of_records_may_be_text():
    assert as_record('{"a": 1}') == as_record({"a": 1}) == {"a": 1}
    for value in (None, 5, "[]", "{", '{"a": 1, "a": 1}'):
        with pytest.raises(ValueError):
            as_record(value)
