"""Where sentences end, and where a full stop is none."""

from __future__ import annotations

import pytest

from alignpro.train.sentences import sentence_end


def split_sentences(text: str) -> list[str]:
    """Of a whole text, without outer white space."""
    sentences, rest = [], text
    while rest.strip():
        end = sentence_end(rest + "\n")
        sentences.append(rest[:end].strip())
        rest = rest[len(rest) if end is None else end :]
    return sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog runs. It is 1.5 m tall. Good!", ["A dog runs.", "It is 1.5 m tall.", "Good!"]),
        ("Toys, e.g. a red ball, lie there. End", ["Toys, e.g. a red ball, lie there.", "End"]),
        ("Mr. Smith met J. Doe. Who?", ["Mr. Smith met J. Doe.", "Who?"]),
        ('She said "Stop." Then left.', ['She said "Stop."', "Then left."]),
        ("It was I. He knew.", ["It was I.", "He knew."]),
        ("Cups, plates etc. were there.", ["Cups, plates etc. were there."]),
        ("Cups, plates etc. They were new.", ["Cups, plates etc.", "They were new."]),
        ("Well ... maybe. Or not...", ["Well ... maybe.", "Or not..."]),
        ("Objects:\n1. A dog\n2. A cat", ["Objects:", "1. A dog", "2. A cat"]),
        ("\n\nA dog.\n\n\nA cat.", ["A dog.", "A cat."]),
        ("There are 3. Then more.", ["There are 3.", "Then more."]),
        ("What?! No\u2026 Yes", ["What?!", "No\u2026", "Yes"]),
        ("", []),
    ],
)
def test_sentences_of_a_whole_text(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("A dog.", None),  # 5 may follow
        ("A dog. ", 6),
        ("A dog of 1.", None),
        ("A dog of 1.5", None),
        ("Such as, e.g. ", None),
        ("A dog.\n", 6),
        ("\n\n", None),
        ("A dog", None),
    ],
)
def test_an_end_is_said_once_it_is_certain(text, end):
    assert sentence_end(text) == end
