"""Results in JSON and back, and what is no result."""

from __future__ import annotations

import json

import pytest

from alignpro.evaluate.results import Report, from_json, to_json
from made_up_report import full_report, typed


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["arms"], [], r"r.arms: expected an object, got \[\]"),
        (["arms", "raw", "mean_reward"], None, "r.arms.raw.mean_reward: expected a number, got no"),
        (
            ["arms", "raw", "ci95"],
            [0.1, float("nan")],
            r"r.arms.raw.ci95: expected \[low, high\], got \[0.1, nan\]",
        ),
        (["arms", "raw", "n"], True, "r.arms.raw.n: expected a number, got True"),
        (["paired", "trained_minus_raw", "mean"], "1", "r.paired.trained_minus_raw.mean: expecte"),
        (["headroom", "frontier", 0, "kl_coef"], None, r"r.headroom.frontier\[0\].kl_coef: expe"),
        (["bound", "terms", "kl"], 3, "r.bound.terms.kl: expected an object with mean and ci95"),
        (["bound", "holds"], 1, "r.bound.holds: expected true or false, got 1"),
        (["judge", "comparisons", "trained_vs_raw"], 0.5, "comparisons.trained_vs_raw: expected a"),
        (["samples", 0, "prompt"], None, r"r.samples\[0\].prompt: expected text, got nothing"),
        (["samples"], {}, r"r.samples: expected a list, got \{\}"),
    ],
)
def test_another_shape_is_said(place, value, message):
    report = full_report()
    holder = report
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_json(Report, report, "r")


def test_results_come_back_from_json_as_they_were():
    assert to_json(typed(full_report())) == full_report()
    plain = json.loads(json.dumps(to_json(typed(full_report()))))
    assert from_json(Report, plain, "r") == typed(full_report())
    assert from_json(Report, {**full_report(), "of another version": 1}, "r") == typed(
        full_report()
    )
