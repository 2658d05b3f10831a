"""The prompts and instructions the package ships: counts, form, no leak across the split."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files

import pytest

# Words that carry no topic: two questions that share only these are not alike.
FUNCTION_WORDS = {
    "a", "about", "an", "and", "are", "as", "at", "be", "before", "by", "can", "could",
    "describe", "do", "does", "explain", "for", "from", "has", "have", "how", "i", "in", "into",
    "is", "it", "its", "make", "makes", "me", "more", "my", "of", "on", "one", "or", "out",
    "should", "so", "some", "than", "that", "the", "their", "them", "they", "this", "to", "use",
    "was", "what", "when", "which", "who", "with", "without", "would", "write", "you", "your",
}  # fmt: skip
# Text that some chat template turns into a control token.
CONTROL_TEXT = re.compile(r"<\||\|>|</?s>|<end|\[/?INST\]|<<")
TOO_ALIKE = 0.5  # the most alike pairs share 0.38 across the split, 0.40 with the instructions


def read_rows(name: str) -> list[dict[str, str]]:
    text = (files("alignpro") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def content_words(text: str) -> frozenset[str]:
    """Lower-case words with a topic, plural "s" dropped."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(w.rstrip("s") for w in words if w not in FUNCTION_WORDS)


def overlap(first: str, second: str) -> float:
    """Jaccard index of the content words, 0 to 1."""
    a, b = content_words(first), content_words(second)
    return len(a & b) / max(1, len(a | b))


def alike(firsts: Iterable[str], seconds: Iterable[str]) -> Iterator[tuple[str, str]]:
    others = list(seconds)
    return (
        (x, y)
        for x in firsts
        for y in others
        if x.lower() == y.lower() or overlap(x, y) >= TOO_ALIKE
    )


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    return read_rows("everyday_prompts.jsonl")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    return read_rows("instructions.jsonl")


def test_overlap_sees_a_near_duplicate_and_passes_a_shared_question_form():
    near = list(alike(["How do I store fresh herbs?"], ["What helps to store fresh herbs?"]))
    assert len(near) == 1
    assert not list(alike(["What is the use of a lock?"], ["What is the use of a kite?"]))
    assert overlap("Why do trees grow?", "Where do trees fall?") == pytest.approx(1 / 5)


def test_the_installed_package_carries_its_types():
    for name in ("py.typed", "_core.pyi"):
        assert (files("alignpro") / name).is_file(), name


def test_prompts_are_160_of_which_64_held_out(prompts):
    assert Counter(row["split"] for row in prompts) == {"train": 96, "heldout": 64}
    assert all(set(row) == {"prompt", "split"} for row in prompts)
    assert len({row["prompt"].lower() for row in prompts}) == 160


def test_no_held_out_prompt_resembles_a_training_prompt(prompts):
    by_split = {
        split: [row["prompt"] for row in prompts if row["split"] == split]
        for split in ("train", "heldout")
    }
    assert list(alike(by_split["heldout"], by_split["train"])) == []


def test_instruction_pairs_use_other_prompts_than_training_and_evaluation(prompts, pairs):
    texts = [row["prompt"] for row in prompts]
    assert list(alike([row["prompt"] for row in pairs], texts)) == []


def test_pairs_are_104_prompts_with_each_of_52_instructions_twice(pairs):
    assert all(set(row) == {"prompt", "instruction"} for row in pairs)
    assert len(pairs) == 104
    assert len({row["prompt"].lower() for row in pairs}) == 104
    assert set(Counter(row["instruction"] for row in pairs).values()) == {2}


def test_prompts_are_one_line_of_six_to_twenty_five_words(prompts, pairs):
    for row in prompts:
        assert 6 <= len(row["prompt"].split()) <= 25, row
    for row in prompts + pairs:
        text = row["prompt"]
        assert text == text.strip() and text[-1] in ".?" and text[0].isupper(), row
        assert text.isprintable() and text.isascii() and not CONTROL_TEXT.search(text), row


def test_instructions_are_one_sentence_of_four_to_eleven_words(pairs):
    # The default rewrite is cut at 12 tokens: an instruction of common words must fit.
    for row in pairs:
        text = row["instruction"]
        assert 4 <= len(text.split()) <= 11 and len(text) <= 60, row
        assert text == text.strip() and text.count(".") == 1 and text.endswith("."), row
        assert text.isprintable() and text.isascii() and not CONTROL_TEXT.search(text), row


def test_instructions_are_not_chosen_for_the_reward(pairs):
    """Support for many tones: pleasant ones are there, and are a small part."""
    pleasant = re.compile(
        r"warm|friend|kind|gentle|encourag|enthusias|cheer|joy|happy|lively|praise|confidence|"
        r"motivate",
        re.IGNORECASE,
    )
    dark = re.compile(r"gloomy|worst|melancholy|fail|grave|critical|blunt|strict|dry|risk", re.I)
    texts = [row["instruction"] for row in pairs]
    assert 0.08 <= sum(bool(pleasant.search(t)) for t in texts) / len(texts) <= 0.16
    assert sum(bool(dark.search(t)) for t in texts) / len(texts) >= 0.08
    # One form for all: the prompter chooses a style, and no wording says which is meant to win.
    assert {text.split()[0] for text in texts} == {"Answer"}


def test_no_style_is_tied_to_a_topic(pairs):
    """A word of an instruction is no clue to its prompt: the two share no content word."""
    for row in pairs:
        shared = content_words(row["prompt"]) & content_words(row["instruction"])
        assert not shared, (row, sorted(shared))


def test_warm_tones_prefer_one_set_of_the_instructions_to_another(pairs):
    rows = read_rows("warm_tones.jsonl")
    assert all(set(row) == {"prompt", "chosen", "rejected", "split"} for row in rows)
    chosen, rejected = ({row[side] for row in rows} for side in ("chosen", "rejected"))
    assert len(chosen) == len(rejected) == 10 and not chosen & rejected
    assert chosen | rejected <= {row["instruction"] for row in pairs}
    assert Counter(row["prompt"] for row in rows) == {row["prompt"]: 2 for row in pairs}
    splits = {row["prompt"]: row["split"] for row in rows}
    assert all(splits[row["prompt"]] == row["split"] for row in rows)  # a prompt is in one alone
    assert Counter(splits.values()) == {"train": 72, "validation": 16, "heldout": 16}
