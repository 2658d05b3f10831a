"""What was written in numbers, and every rule on both sides of its threshold."""

from __future__ import annotations

import dataclasses

import pytest

from alignpro.config import Prompting
from alignpro.findings import (
    Measured,
    arm_findings,
    copied_share,
    diversity,
    holds_answer,
    measure,
)
from alignpro.types import Response, Rewrite, Rollout

PLAIN = Measured(
    components={"topic": 0.5},
    component_errors={"topic": 0.03},
    empty_rewrites=0,
    response_tokens=40.0,
    truncated_responses=0.25,
    rewrite_tokens=10.0,
    truncated_rewrites=0.25,
    copy_rate=0.5,
    leaked_answers=0.1,
    distinct_rewrites=9,
    common_rewrite=0.9,
)


def found(before=PLAIN, **now):
    now = dataclasses.replace(PLAIN, **now)
    return {f.key: f.text for f in arm_findings(now, {"untuned prompter": before})}


def test_every_rule_by_name_and_number():
    assert found() == {}
    texts = {
        **found(response_tokens=50.1),
        **found(rewrite_tokens=7.4),
        **found(copy_rate=0.51),
        **found(leaked_answers=0.11),
        **found(common_rewrite=0.91),
        **found(truncated_responses=0.26),
        **found(truncated_rewrites=0.27),
    }
    for key, part in {
        "responses_length": "responses are 25% longer than those of the untuned prompter, past 25%",
        "rewrites_length": "rewrites are 26% shorter",
        "copy_rate": "copy rate is 51%, above 50%",
        "leaked_answers": "11% of the trained prompter's rewrites hold the answer, above 10%",
        "one_rewrite": "91% of the trained prompter's rewrites are one text, above 90%",
        "truncated_responses": "above 25% (untuned prompter 25%)",
        "truncated_rewrites": "27% of the trained prompter's rewrites are cut at max_new_tokens",
    }.items():
        assert part in texts.pop(key)
    assert texts == {}


def test_a_component_that_falls():
    # Two standard errors of the difference: 2 * sqrt(0.03 ** 2 + 0.04 ** 2) = 0.1.
    before = dataclasses.replace(PLAIN, component_errors={"topic": 0.04})
    assert found(before, components={"topic": 0.401}) == {}
    (text,) = found(before, components={"topic": 0.399}).values()
    assert "topic falls to 0.399" in text and "from 0.500 with the untuned prompter" in text
    assert found(before, components={"topic": 0.9}) == {}
    # One that the reward takes off for has no error here, and may fall.
    assert found(before, components={"topic": 0.1}, component_errors={}) == {}
    assert found(before, components={"other": 0.1}, component_errors={"other": 0.0}) == {}
    # Where nothing varies a mean that stays does not fall.
    still = dataclasses.replace(PLAIN, component_errors={"topic": 0.0})
    assert found(still, component_errors={"topic": 0.0}) == {}


def test_the_step_from_which_on_one_text_is_written():
    one = dataclasses.replace(PLAIN, common_rewrite=1.0)
    (finding,) = arm_findings(one, {}, since=4)
    assert "100% of the trained prompter's rewrites are one text from step 4 on" in finding.text


def test_an_arm_that_lacks_the_numbers_is_no_finding():
    bare = Measured({}, {}, 0, 0.0, 0.0)
    assert list(arm_findings(bare, {"raw prompt": PLAIN})) == []
    assert list(arm_findings(PLAIN, {"raw prompt": bare})) == []


def rollout(*groups):
    """Groups of (rewrite, response) of the prompts "p0 ...", "p1 ..."."""

    def answered(index, text, response):
        reply = Response([1, 2], response, [0.0, 0.0], "length" if "cut" in response else "stop")
        return Rewrite(
            index, [], [1] * len(text.split()), [], text, text, [], "stop", responses=[reply]
        )

    prompts = [f"p{i} what is the tallest tree on earth" for i in range(len(groups))]
    rewrites = [[answered(i, *one) for one in group] for i, group in enumerate(groups)]
    return Rollout(prompts, rewrites, {}, 0)


def test_the_measures_of_a_rollout_by_hand():
    drawn = rollout(
        [("Be brief.", "A redwood."), ("", "cut")],
        [("Say that it is a redwood.", "That it is a redwood."), ("Be brief.", "ok")],
    )
    components = {"good": [1.0, 0.0, 1.0, 1.0], "long": [4.0, 4.0, 4.0, 4.0]}
    measured = measure(
        drawn,
        components,
        frozenset({"good"}),
        adds=True,
        prompting=Prompting(mode="rewrite"),
        count_tokens=lambda text: 0,
    )
    assert measured == Measured(
        components={"good": 0.75, "long": 4.0},
        component_errors={
            "good": pytest.approx(0.25)
        },  # means 0.5 and 1: deviation 0.354, by root 2
        empty_rewrites=1,
        response_tokens=2.0,
        truncated_responses=0.25,
        rewrite_tokens=2.5,
        truncated_rewrites=0.0,
        copy_rate=0.0,
        leaked_answers=0.25,
        distinct_rewrites=3,
        common_rewrite=0.5,
        broken_guards={},
    )
    # A part that abstained is no zero; of one prompt alone there is no error of its mean.
    nan = float("nan")
    abstained = {"good": [nan, nan, 1.0, 0.0], "long": [nan] * 4}
    plain = {"adds": False, "prompting": Prompting(), "count_tokens": len}
    some = measure(drawn, abstained, frozenset(abstained), **plain)
    assert (some.components, some.component_errors) == ({"good": 0.5}, {})
    raw = measure(drawn, components, frozenset(), **plain)
    assert raw.rewrite_tokens is None and raw.leaked_answers is None and raw.empty_rewrites == 0
    assert raw.broken_guards is None
    # Of one prompt alone nobody knows whether the text is that of every prompt.
    assert diversity(rollout([("x", ""), ("x", "")])) == (1, None)
    assert diversity(rollout([("x", "")], [("x", "")])) == (1, 1.0)


def test_rewrites_that_break_a_guard_are_counted_by_guard_and_doubted():
    drawn = rollout(
        [("Sure, a redwood.", "x"), ("Name the tallest tree.", "x")],
        [("## Instruction: name it", "x"), ("", "x")],
    )
    prompting = Prompting(mode="rewrite")
    measured = measure(
        drawn, {}, frozenset(), adds=True, prompting=prompting, count_tokens=lambda text: 0
    )
    assert measured.broken_guards == {"answered": 0.25, "echo": 0.25}
    assert found(broken_guards={"cut": 0.05, "spans": 0.05}) == {}
    text = found(broken_guards={"cut": 0.05, "spans": 0.2})["broken_guards"]
    assert "25% of the trained prompter's rewrites break a guard (cut 5%, spans 20%)" in text


@pytest.mark.parametrize(
    ("rewrite", "response", "answer", "holds"),
    [
        ("Answer in one sentence.", "The redwood is the tallest tree.", None, False),
        ("The coast redwood grows tallest.", "The coast redwood grows tallest.", None, True),
        # A response that goes on after it, and a rewrite that says more than the answer.
        ("The coast redwood grows tallest.", "The coast redwood grows " + "so " * 40, None, True),
        ("Write, politely and briefly: a coast redwood.", "A coast redwood.", None, True),
        # One or two words, or what the prompt says itself, are no sign of it.
        ("Answer Yes or No.", "Yes.", None, False),
        ("Numbered steps.", "Here are the numbered steps: 1. Go.", None, False),
        ("what is the tallest tree on earth", "What is the tallest tree on earth?", None, False),
        # With an answer that is known, one word is enough; the prompt may say it.
        ("Say Sequoia.", "no", "sequoia", True),
        ("Say Sequoias.", "no", "sequoia", False),
        ("Name a tree.", "no", "tree", False),
        ("Name an ash.", "no", ["oak", "Ash"], True),
        ("The coast redwood grows tallest.", "The coast redwood grows tallest.", "oak", False),
        ("", "", "", False),
    ],
)  # fmt: skip
def test_whether_a_rewrite_holds_the_answer(rewrite, response, answer, holds):
    prompt = "p0 what is the tallest tree on earth"
    assert holds_answer(rewrite, prompt, ["something else", response], answer) == holds


@pytest.mark.parametrize(
    ("prompt", "rewrite", "share"),
    [
        ("How do I boil an egg?", "how do I boil an egg", 1.0),
        ("How do I boil an egg?", "Please boil an egg now", 3 / 5),
        ("How do I boil an egg?", "an egg to boil", 0.0),  # no run of three
        ("How do I boil an egg?", "An egg", 1.0),  # shorter than a run: the whole of it
        ("How do I boil an egg?", "Egg boil", 0.0),
        ("one two three four", "one two three x two three four", 6 / 7),
        ("anything", "", 0.0),
        ("anything", "?!", 0.0),
    ],
)
def test_copied_share(prompt, rewrite, share):
    assert copied_share(prompt, rewrite) == pytest.approx(share)
