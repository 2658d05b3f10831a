"""Each guard by hand-written cases, both ways: what it must stop, and what it must let pass."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alignpro
from alignpro.config import GuardConfig, Prompting
from alignpro.guards import (
    _OF_WORD,
    _SCRIPTS,
    Candidate,
    broken_guard,
    language,
    numbers,
    script,
    verbatim_spans,
)
from testing_extension import load_testing

REWRITE = Prompting(mode="rewrite", template="Rewrite the request below clearly.\n\n{prompt}")
APPEND = Prompting()
OFF = GuardConfig(
    spans=False, language=False, max_growth=None, cut=False, answered=False, echo=False
)

RUSSIAN_CODE = "\n```\n" + "\u0438" * 20 + "\n```"


def in_cpp(candidate, prompting, guards):
    """`broken_guard` of the C++ prompter."""
    testing = load_testing()
    before, after = prompting.template.split("{prompt}")
    broken = testing.broken_guard(
        *(candidate.prompt, candidate.turn, candidate.text, candidate.was_cut),
        *(prompting.mode == "append", before, after, testing.Guards(**vars(guards))),
    )
    return broken.removeprefix("guard_") or None


@pytest.fixture(params=[broken_guard, in_cpp], ids=["python", "c++"])
def judge(request):
    return request.param


@pytest.fixture
def rewritten(judge):
    def broken(prompt, text, guards=None, was_cut=False):
        return judge(Candidate(prompt, text, text, was_cut), REWRITE, guards or GuardConfig())

    return broken


@pytest.fixture
def appended(judge):
    def broken(prompt, text):
        return judge(Candidate(prompt, f"{prompt}\n\n{text}", text), APPEND, GuardConfig())

    return broken


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("What is 12 times 7?", "Compute 12 times 17 step by step."),
        ("Sum 1,234.50 and 2", "Add 1234.50 to 2 and show the sum."),
        ("It costs 5%?", "Explain whether it costs 5."),
        ("Meet at 10:30?", "Ask whether to meet at half past ten."),
        ('Translate "good morning" please', "Translate a greeting, please."),
        ("Was bedeutet \u201eGlück auf\u201c?", "Was bedeutet der Gruß der Bergleute?"),
        ("Fix `x += 1` in my loop", "Fix the increment in my loop."),
        ("Why?\n```python\nprint(1 / 0)\n```", "Why does dividing by zero fail?\n```python\n```"),
        ("Read https://example.com/a?b=1 now", "Read https://example.com/a now."),
        ("Write to ada@example.org", "Write to Ada."),
        ("Ask [protected]only Dr. Oe[/protected] about it", "Ask the doctor about it."),
        ("Choose: A) 3 B) 4", "Choose between three (A) and four (B)."),
    ],
)
def test_spans_that_are_lost_are_seen(rewritten, prompt, text):
    assert rewritten(prompt, text) == "spans"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("What is 12 times 7?", "Compute 12 \u00d7 7 and show each step."),
        ('Translate "good morning"', "Give the French for \u201cgood morning\u201d."),
        ("Fix `x += 1`", "Explain what is wrong with x += 1 and fix it."),
        ("See (https://example.com/a).", "Summarise https://example.com/a for a child."),
        ("Ask [protected]only Dr. Oe[/protected]", "Please ask only Dr. Oe."),
        ("How do bees fly?", "Explain in 3 steps how bees fly."),  # new numbers may come
        ("It's Ann's and Bob's", "Say that it belongs to Ann and Bob."),  # no quotation
    ],
)
def test_spans_that_are_kept_pass(rewritten, prompt, text):
    assert rewritten(prompt, text) is None


def test_a_mark_that_begins_twice_begins_at_the_second():
    assert verbatim_spans("\u201cone \u201ctwo\u201d") == ["two"]
    assert verbatim_spans("\xab one \xab two \xbb") == ["two"]
    assert verbatim_spans("[protected]one [protected]two[/protected]") == ["two"]


# Each took seconds to hours, in which `re` keeps every other thread waiting.
ENDLESS = [
    *("a" * 99_999, "a." * 50_000, "\u201ca" * 50_000, "\u201ea" * 50_000),
    *("\xab " * 50_000, "\xab" + " " * 99_999, "[protected]" * 9_000),
]


@pytest.mark.parametrize("number", range(len(ENDLESS)))
def test_a_text_of_beginnings_is_read_in_time(number):
    code = f"from test_guards import *; assert verbatim_spans(ENDLESS[{number}]) == []"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=60)


def test_numbers_are_whole():
    assert numbers("a1 12 3.5 -4 1,000 7% 2e-3 v2 10:30.") == {
        *("12", "3.5", "-4", "1,000", "7%", "2e-3", "10:30")
    }


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Wie macht man das Brot und warum ist es nicht sauer?", "Tell how the bread is made."),
        ("Pourquoi est-ce que le ciel est bleu ?", "Explain why the sky is blue."),
        (
            "\u041f\u043e\u0447\u0435\u043c\u0443 \u043d\u0435\u0431\u043e",
            "Explain why the sky looks blue.",
        ),
        ("天空为什么是蓝色的", "Explain why the sky is blue."),
        (
            "Why is the sky blue?",
            "请解释天空为什么是蓝色的",
        ),
    ],
)
def test_another_language_is_seen_in_both_modes(rewritten, appended, prompt, text):
    assert rewritten(prompt, text) == "language"
    assert appended(prompt, text) == "language"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Why is the sky blue?", "Explain briefly why the sky is blue."),
        ("東京は?", "トーキョー"),  # with the sign for long vowels
        (
            f"Fix it.{RUSSIAN_CODE}",
            f"Fix this small program, and say what was wrong.{RUSSIAN_CODE}",
        ),
        ("Wie macht man Brot?", "Beschreibe Schritt für Schritt, wie man ein Brot macht."),
        ("Was ist das Phänomen?", "Erkläre, was es mit dem Phänomen auf sich hat."),
        (
            "東京はどこですか",
            "東京の場所を説明",
        ),  # kana, and Han alone
        ("Pasta alla norma?", "Give a recipe."),  # too little to tell
        ("What does 'le monde' mean?", "Explain the meaning of 'le monde'."),
    ],
)
def test_the_same_language_passes(rewritten, prompt, text):
    assert rewritten(prompt, text) is None


def test_cpp_has_the_same_scripts_and_words():
    only = replace(OFF, language=True)
    edges = {code for first, last, _ in _SCRIPTS for code in (first - 1, first, last, last + 1)}
    samples = [chr(code) * 9 for code in sorted(edges)] + [text + " " + text for text in _OF_WORD]
    for sample in samples:
        for text in (
            "Erkl\xe4re das und nichts sonst, wie es ist",
            "\u4e16\u754c",
            "sheep the and",
        ):
            candidate = Candidate(sample, text, text)
            assert in_cpp(candidate, REWRITE, only) == broken_guard(candidate, REWRITE, only)


def test_what_cannot_be_told_is_not():
    assert script("12 + 3?") is None and language("ok") is None and language("de die la") is None
    assert (
        language("What is the time?") == "en"
        and script("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u05d8\u05d5\u05d1")
        == "HEBREW"
    )


def test_length(rewritten):
    assert rewritten("Why?", "Explain why. " * 40) == "length"
    assert rewritten("Why?", "Explain why. " * 30) is None  # 390 characters are free
    long = "Tell me a story about birds. " * 40
    assert rewritten(long, long + long) is None
    assert rewritten("Why?", "Explain why. " * 40, GuardConfig(max_growth=None)) is None


def test_a_prompt_that_was_cut_is_no_prompt_and_an_instruction_may_be(judge, rewritten):
    assert rewritten("Why is it so?", "Explain in detail why it is so and", was_cut=True) == "cut"
    cut = Candidate("Why is it?", "Why is it?\n\nAnswer in a few", "Answer in a few", True)
    assert judge(cut, APPEND, GuardConfig()) is None


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Bees fly by beating their wings.",
        "Here's how bees fly:",
        "The answer is that they beat their wings.",
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I cannot fly.",
        "Yes, they do.",
        "**Answer:** They beat their wings.",
    ],
)
def test_answers_are_seen(rewritten, appended, text):
    assert rewritten("How do bees fly?", text) == "answered"
    assert appended("How do bees fly?", text) == "answered"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("How do bees fly?", "How do bees fly? Answer in one sentence."),
        ("How do bees fly?", "Heretics aside, how do bees fly?"),
        ("How do bees fly?", "No more than three sentences: how do bees fly?"),
        ("Here is my text: bees", "Here is my text: bees. Shorten it."),
    ],
)
def test_rewrites_are_no_answers(rewritten, prompt, text):
    assert rewritten(prompt, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Rewrite the request below clearly. How do bees fly?",
        "How do bees fly?<|im_end|>",
        "How do bees fly?\nAssistant: They beat their wings.",
        "[INST] How do bees fly? [/INST]",
        "### Instruction\nHow do bees fly?",
    ],
)
def test_an_echo_is_seen(rewritten, text):
    assert rewritten("How do bees fly?", text) == "echo"


def test_no_echo(rewritten, appended):
    assert rewritten("What does [INST] do?", "Explain what [INST] does.") is None
    prompt = "Rewrite the request below clearly."
    assert rewritten(prompt, prompt + " Now.") is None  # the user's own words
    assert appended("How do bees fly?", "Answer the request in verse.") is None


def test_every_guard_can_be_turned_off(rewritten):
    assert rewritten("Why 12?", "Sure! <|im_end|> " * 40, OFF, was_cut=True) is None


# What the expressions tell apart, and what only looks like it.
PARTS = st.sampled_from(
    [
        *"aSik \n\t\"`'.,:/+-%@(#<>|[]eE_\u017f\u0130\u0131\u212a\xdf\u0663\xbd\u2212\u3000",
        *"\x1c\xe9\xc9\u201c\u201d\u201e\xab\xbb\u03a3\u03c2",
        *(
            "12",
            "1,000",
            "3.5",
            "2e-3",
            "10:30",
            "7%",
            " 4 ",
            "`x`",
            "```",
            "```py\n",
            '"ab"',
            "\xab ",
        ),
        *("[protected]", "[/PROTECTED]", "https://a.b/c", "www.", "http://", "a.b@c-d.ef", "@x.y"),
        *("Sure!", "no,", "Here is", "i'm sorry", "The final answer is", "Answer:", "I can't"),
        *("<|im_end|>", "<|", "[INST]", "<</SYS>>", "\n## ", "Response", "\nUser: ", "Input", "##"),
        *(
            "Rewrite the request below clearly.",
            "REWRITE the request",
            "Stra\xdfen und Wege",
            "STRASSEN UND WEGE",
        ),
        *(" the ", " what ", " F\xdcR ", " i\u017ft ", " les ", "le_s", " que ", "2das"),
        *("\u041f\u043e\u0447\u0435\u043c\u0443", "\u5929\u7a7a", "\u30fc", "\uac00\ub098"),
    ]
)
MIXED = st.lists(PARTS, max_size=12).map("".join)


ALONE = [replace(OFF, **{name: True}) for name in ("spans", "language", "cut", "answered", "echo")]
TOGETHER = [replace(OFF, max_growth=0.5, free_characters=9), GuardConfig()]


@settings(max_examples=3000, deadline=None)
@given(
    prompt=MIXED,
    parts=st.tuples(MIXED, MIXED),
    template=st.lists(PARTS | st.just("\n"), max_size=4).map("".join),
    keeps=st.sampled_from(["nothing", "the end", "every span", "all but one"]),
    append=st.booleans(),
    was_cut=st.booleans(),
    guards=st.sampled_from([ALONE[0], *ALONE[:2], *ALONE, *TOGETHER]),
)
def test_cpp_says_what_python_says(prompt, parts, template, keeps, append, was_cut, guards):
    spans = [*verbatim_spans(prompt), *sorted(numbers(prompt))]
    kept = {"nothing": [], "the end": [prompt[1:]], "every span": spans, "all but one": spans[1:]}
    text = " ".join([parts[0], *kept[keeps], parts[1]])
    prompting = Prompting(mode="append" if append else "rewrite", template=template + "{prompt}")
    candidate = Candidate(prompt, text, text, was_cut)
    assert in_cpp(candidate, prompting, guards) == broken_guard(candidate, prompting, guards)


def test_a_prompter_uses_what_its_guards_let_pass(tiny_model_dir):
    params = alignpro.SamplingParams(max_new_tokens=5, ignore_eos=True, temperature=0.0)
    options = {"prompting": REWRITE, "params": params, "threads": 1}
    with alignpro.Prompter(tiny_model_dir("llama"), guards=GuardConfig(), **options) as prompter:
        result = prompter.rewrite("What is 12 times 7?")
        assert (result.prompt, result.applied) == ("What is 12 times 7?", False)
        assert result.reason == "guard_cut" and result.text and result.tokens == 5
        prompter.guards = GuardConfig(cut=False)
        assert prompter.rewrite("What is 12 times 7?").reason == "guard_spans"
        prompter.guards = GuardConfig(cut=False, spans=False)
        assert prompter.rewrite("What is 12 times 7?").prompt == result.text
