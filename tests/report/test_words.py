"""What the report claims, in words."""

from __future__ import annotations

import dataclasses

import pytest

from alignpro.evaluate.results import GapClosed, Interval, Required
from alignpro.report.words import (
    gap_sentences,
    headline,
    interval,
    judge_verdict,
    number,
    required_verdicts,
    verdict,
)
from made_up_report import arm, comparison, evaluation


def report(**differences):
    """Arms at mean 0.5 minus the difference; intervals of half a width of 0.02."""
    paired = {
        f"trained_minus_{key}": Interval(d, d - 0.02, d + 0.02) for key, d in differences.items()
    }
    arms = {key: arm(0.5 - d) for key, d in differences.items()}
    return evaluation({**arms, "trained": arm(0.5)}, paired=paired)


def test_verdicts_claim_only_what_the_interval_supports():
    assert "beats" in verdict(Interval(0.3, 0.1, 0.5), "raw prompt").text
    assert "+0.300" in verdict(Interval(0.3, 0.1, 0.5), "raw prompt").text
    assert "does worse than the x" in verdict(Interval(-0.3, -0.5, -0.1), "x").text
    for bounds in ((-0.1, 0.5), (0.0, 0.5), (-0.5, 0.0)):
        assert "No clear difference" in verdict(Interval(0.2, *bounds), "x").text


@pytest.mark.parametrize(
    ("differences", "tone", "start"),
    [
        ({"raw": 0.1, "untuned": 0.1, "static": -0.05}, "worse", "The static instruction wins"),
        ({"raw": 0.1, "untuned": 0.1, "static": -0.01}, "unclear", "The trained prompter is not"),
        (
            {"raw": 0.1, "untuned": 0.1, "static": 0.05},
            "better",
            "Yes: it beats the raw prompt, the untuned prompter and the static instruction.",
        ),
        (
            {"raw": 0.1, "untuned": 0.1},
            "better",
            "Yes: it beats the raw prompt and the untuned prompter.",
        ),
        (
            {"raw": 0.1, "untuned": 0.0},
            "unclear",
            "In part: it beats the raw prompt; it is not clearly better than the untuned prompter.",
        ),
        (
            {"raw": 0.0, "untuned": 0.1},
            "unclear",
            "Not shown: it beats the untuned prompter; it is not clearly better than the raw",
        ),
        ({"raw": -0.1, "untuned": 0.1}, "worse", "No: the raw prompt does better"),
        ({"raw": -0.1, "static": -0.2}, "worse", "The static instruction wins"),
        ({"raw": -0.2, "static": -0.1}, "worse", "No: the raw prompt does better"),
        ({"untuned": 0.1}, "better", "Yes: it beats the untuned prompter."),
        (
            {"raw": 0.1, "static": 0.1, "policy_text": 0.0, "labelled": -0.2},
            "unclear",
            "In part: it beats the raw prompt and the static instruction; it is not clearly better "
            "than the policy text.",
        ),
        (
            {"untuned": 0.0},
            "unclear",
            "Not shown: it is not clearly better than the untuned prompter.",
        ),
        (
            {"tuned": -0.2, "optimum": -0.1},
            "unclear",
            "Not known: the trained prompter was compared with no",
        ),
    ],
)
def test_the_headline(differences, tone, start):
    said = headline(report(**differences))
    assert said.text.startswith(start)
    assert said.tone == tone


def test_a_static_instruction_that_wins_is_advised():
    wins = headline(report(raw=0.1, static=-0.05)).text
    assert "beats the trained prompter by 0.050" in wins
    assert "cheaper per request" in wins and wins.endswith("Use the instruction.")
    level = headline(report(raw=0.1, static=-0.01)).text
    assert "the static instruction is ahead by 0.010" in level and "cheaper per request" in level
    assert "the trained prompter is ahead by 0.010" in headline(report(static=0.01)).text
    # It is not advised where the raw prompt does better than both.
    clear = {
        "trained_minus_raw": Interval(-0.01, -0.03, 0.01),
        "trained_minus_static": Interval(-0.005, -0.007, -0.003),
    }
    level = dataclasses.replace(report(raw=-0.01, static=-0.005), paired=clear)
    assert "needs neither" in headline(level).text


def test_without_an_evaluation_nothing_is_claimed():
    assert headline(None).tone == "unclear" and headline(None).text.startswith("Not known yet")
    assert "no trained prompter" in headline(evaluation({"raw": arm(1.0)})).text


def test_the_judges_verdict():
    row = comparison(win_rate=0.62, ci95=(0.52, 0.72), length_controlled_win_rate=0.55)
    said = judge_verdict("trained_vs_raw", row)
    assert said == (
        "better",
        "The judge prefers the trained prompter over the raw prompt: win rate 62% (52% to 72%), "
        "55% at equal length.",
    )
    assert judge_verdict(
        "trained_vs_raw", dataclasses.replace(row, ci95=(0.2, 0.4))
    ).text.startswith("The judge prefers the raw prompt over the trained prompter")
    assert (
        judge_verdict("trained_vs_raw", dataclasses.replace(row, ci95=(0.4, 0.6))).tone == "unclear"
    )
    assert judge_verdict("a_vs_b", comparison()).text.startswith(
        "The judge does not tell the a from the b"
    )


def test_the_gaps_closed_in_words():
    gap = Interval(0.3, 0.2, 0.4)
    said = gap_sentences(
        evaluation(
            {},
            gap_closed=GapClosed(None, None, gap, "the tuned target is not clearly apart"),
            static_to_labelled=GapClosed(1.1, (0.7, 1.3), gap),
        )
    )
    assert said == [
        "No share of the gap between the untuned prompter and the tuned target: the tuned target "
        "is not clearly apart.",
        "The trained prompter closes 110% (95% interval 70% to 130%) of the gap between the static "
        "instruction and the labelled rule.",
    ]
    assert gap_sentences(evaluation({})) == []
    change = Interval(-0.2, -0.304, 0.05)
    assert gap_sentences(evaluation({}, variance_change=change)) == [
        "The variance of its reward against the untuned prompter's: -20% (-30% to +5%)."
    ]
    soft = {f"soft_minus_{arm}": gap for arm in ("raw", "untuned", "static")}
    (said,) = gap_sentences(evaluation({}, soft_differences=soft))
    assert said == (
        "The soft prompt, a fixed prompt that need not be words, has +0.300 (+0.200 to +0.400) "
        "against the raw prompt and +0.300 (+0.200 to +0.400) against the static instruction."
    )
    for low, high, told in ((-0.4, -0.2, True), (-0.4, 0.1, False), (0.2, 0.4, False)):
        tuned = {"soft_minus_tuned": Interval((low + high) / 2, low, high)}
        (said,) = gap_sentences(evaluation({}, soft_differences=tuned))
        assert said.endswith("came from other weights, not from a prompt.") == told


def test_what_was_required_in_words():
    def required(met, margin=0.05):
        one = Required("trained>static", "trained", "static", Interval(0.1, 0.06, 0.2), margin, met)
        return required_verdicts(evaluation({}, required=[one]))

    (met,) = required(True)
    assert met == (
        "better",
        "Required: trained>static: met, trained prompter minus static instruction is above +0.050: "
        "+0.100 reward per prompt, 95% interval +0.060 to +0.200.",
    )
    ((tone, text),) = required(False, 0.0)
    assert tone == "worse" and "not met" in text and "is not above 0:" in text
    assert required_verdicts(None) == required_verdicts(evaluation({})) == []


def test_numbers_that_are_absent_are_nothing():
    assert number(None) == interval(None) == ""
    assert (number(1), number(-0.5, 1, sign=True), interval((0, 1), 1)) == (
        "1.000",
        "-0.5",
        "0.0 to 1.0",
    )
