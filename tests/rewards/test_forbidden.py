"""Words that a response must not hold: whole ones, in their forms, and nothing else."""

from __future__ import annotations

import pytest

from alignpro.rewards import build_reward
from alignpro.rewards.check import check_columns


def score(response, forbidden):
    return build_reward("forbidden")(["p"], [""], [response], forbidden=[forbidden])[0]


@pytest.mark.parametrize(
    ("response", "forbidden"),
    [
        ("Enjoy your new guitar!", "guitar"),
        ("GUITARS for everyone", "guitar"),
        ("the guitar's strings", "guitar"),
        ("the guitar\u2019s strings", "guitar"),
        ("an ice  cream\nmaker", "ice cream maker"),
        ("two boxes", "box"),
        ("a violin, or a harp", ["harp", "cello"]),
    ],
)
def test_said(response, forbidden):
    assert score(response, forbidden) == 1.0


@pytest.mark.parametrize(
    ("response", "forbidden"),
    [
        ("Happy birthday!", "guitar"),
        ("a guitarist", "guitar"),
        ("", "guitar"),
        ("anything", ""),
        ("anything", None),
        ("anything", []),
        ("ice cream, and a coffee maker", "ice cream maker"),
        ("a sharp turn", ["harp"]),
    ],
)
def test_not_said(response, forbidden):
    assert score(response, forbidden) == 0.0


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"column 'forbidden', row 0: expected text or a .*\[3\]"):
        score("x", [3])
    with pytest.raises(ValueError, match=r"row 1: expected text or a list of texts, got 3"):
        check_columns(build_reward("forbidden"), {"forbidden": ["guitar", 3]})
    with pytest.raises(ValueError, match="reward 'forbidden' needs the data column 'forbidden'"):
        check_columns(build_reward("forbidden"), {"harmful": [True]})
