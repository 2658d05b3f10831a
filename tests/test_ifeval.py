"""IFEval's checks in examples/ifeval: each by hand on both sides, as a reward, on its own file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from alignpro.config import EvalConfig, load_yaml
from alignpro.rewards.build import build_reward
from alignpro.rewards.combine import score_components

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "ifeval"
LANGDETECT = pytest.mark.skipif(
    importlib.util.find_spec("langdetect") is None, reason="langdetect is not installed"
)


@pytest.fixture(scope="module")
def checks():
    spec = importlib.util.spec_from_file_location("checks", FOLDER / "checks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["checks"]


POEM = "one\n\n***\n\ntwo\n***\nthree"
ENGLISH = "The cat sat on the mat and looked at the rain for a long while."
CASES = [
    ("keywords:existence", {"keywords": ["rain", "mat"]}, [ENGLISH, "Rain. MAT"], ["rain"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocks"], ["a Rock."]),
    (
        "keywords:frequency",
        {"keyword": "ab", "frequency": 2, "relation": "at least"},
        ["abab", "AB ab ab"],
        ["ab a b"],
    ),
    (
        "keywords:frequency",
        {"keyword": "ab", "frequency": 2, "relation": "less than"},
        ["ab", "x"],
        ["ab ab"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ["## x", "# #"],
        ["#"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 1, "let_relation": "less than"},
        ["x"],
        ["q"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "One.\n\nTwo\n\nThree"],
        ["One. Two.", "Dr. Who costs 3.5 e.g. today. Two."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ["a b c", "a-b c"],
        ["a b c d", "don't you go"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 3},
        [POEM, "***" + POEM + "***"],
        ["one *** two", "one *** *** two *** three"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["A.\n\nWeekend's here.", 'A.\n\n"weekend", he said.', "A.\n\nweekend\n\n"],
        ["A.\n\nThe weekend.", "weekend\n\nA.", "A.\n\nB.\n\nweekend", "A.\nweekend"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [place]", "[a][b][c]"],
        ["[name]", "[a b"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. More", "p. s. more"],
        ["Bye.", "PS more"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P. P.S more"], ["P.S."]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "text\n* a\n- b"],
        ["* a", "* a\n* b\n- c", "** a\n** b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well. My answer is maybe. So."],
        ["My answer is no", "no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "* * and * *", "a b"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 a Section2"],
        ["Section 1 a", "SECTION 1 SECTION 2", "Section one Section two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', '```\n"x"\n```'],
        ["{a: 1}", 'Here: {"a": 1}'],
    ),
    ("detectable_format:title", {}, ["<<Rain>>\nx", "x << a >>"], ["<Rain>", "<< >>", "<<\n>>"]),
    (
        "combination:two_responses",
        {},
        ["a ****** b", "******a******b******"],
        ["a", "a ****** a", "a ****** b ****** c", "a ****** ****** b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi. "},
        ["say hi. Hi!", " Say hi."],
        ["Hi! Say hi.", "Say"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["So. any questions?", '"Any questions?" '],
        ["Any questions? Yes.", "Any questions"],
    ),
    ("startend:quotation", {}, ['"x"', ' "a" b "c" '], ['"', '"x', 'x "y"', "'x'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["GO NOW", "A well-KNOWN X"],
        ["Go NOW", "well-KNOWN X"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]
LANGUAGES = [
    ("language:response_language", {"language": "de"}, ["Der Hund schläft heute im Garten."]),
    ("change_case:english_capital", {}, [ENGLISH.upper()]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()]),
]


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), CASES)
def test_a_check_by_hand(checks, instruction, arguments, good, bad):
    assert [text for text in good if not checks.follows(text, instruction, **arguments)] == []
    assert [text for text in bad if checks.follows(text, instruction, **arguments)] == []
    assert not checks.follows(" \n", instruction, **arguments)


@LANGDETECT
@pytest.mark.parametrize(("instruction", "arguments", "good"), LANGUAGES)
def test_languages(checks, instruction, arguments, good):
    assert all(checks.follows(text, instruction, **arguments) for text in good)
    assert not checks.follows(ENGLISH, instruction, **arguments)
    assert checks.language("123 456", "en")  # nothing to tell a language by


def test_every_instruction_is_tried(checks):
    tried = {instruction for instruction, *_ in [*CASES, *LANGUAGES]}
    assert tried == set(checks.CHECKS) and len(tried) == 25
    with pytest.raises(ValueError, match=r"expected one of keywords:existence, .* got 'no:such'"):
        checks.follows("x", "no:such")


def test_the_example_as_a_reward(checks, monkeypatch):
    monkeypatch.chdir(FOLDER)
    reward = build_reward(load_yaml(EvalConfig, FOLDER / "evaluate-ifeval.yaml").reward)
    columns = {
        "instruction_id_list": [["punctuation:no_comma", "detectable_format:title"]] * 2,
        # A reader of Parquet gives every row all keys.
        "kwargs": [[{"num_words": None}, {}], [{}, {}]],
        "key": [1, 2],
    }
    scores, parts = score_components(
        reward, ["Say hi"] * 2, [""] * 2, ["<<Hi>> you", "Hi, you"], columns
    )
    assert scores == [1.0, 0.0]
    assert parts["checks:all_followed"] == [1.0, 0.0]
    assert parts["checks:share_followed"] == [1.0, 0.0]
    assert checks.share_followed(
        ["Hi"], [["punctuation:no_comma", "startend:quotation"]], [[{}] * 2]
    ) == [0.5]
