"""Pairs of answers in the forms that people have them, and rows that are refused."""

from __future__ import annotations

import json

import pytest

from alignpro.config import PreferencesConfig
from alignpro.data.files import DataError
from alignpro.data.preferences import PreferenceRow, load_preferences
from alignpro.types import Conversation

USER, OTHER = {"role": "user", "content": "Why?"}, {"role": "user", "content": "How?"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(*rows, **options):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "pairs.jsonl").write_text(text)
        return load_preferences(PreferencesConfig("pairs.jsonl", **options))

    return load


LONG = Conversation((("user", "Hi"), ("assistant", "Hello!")), "Why?")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", "chosen": " b\n", "rejected": "c"}, "Why?"),
        ({"prompt": [*EARLIER, USER], "chosen": "b", "rejected": "c"}, LONG),
        ({"prompt": [USER], "chosen": [answer("b")], "rejected": [answer("c")]}, "Why?"),
        (
            # More than one message that follows the prompt.
            {"prompt": "Hi"}
            | {
                c: [answer("Hello!"), USER, answer(t)]
                for c, t in (("chosen", "b"), ("rejected", "c"))
            },
            LONG,
        ),
        ({"chosen": [USER, answer("b")], "rejected": [USER, answer("c")]}, "Why?"),
        (
            # As UltraFeedback has it: the prompt once more, beside the conversations.
            {"prompt": "Why?", "messages": [USER, answer("b")]}
            | {c: [*EARLIER, USER, answer(t)] for c, t in (("chosen", "b"), ("rejected", "c"))},
            LONG,
        ),
        (
            {
                side: [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": text}]
                for side, text in (("chosen", "b"), ("rejected", "c"))
            },
            "Why?",
        ),
        (
            {c: json.dumps([USER, answer(t)]) for c, t in (("chosen", "b"), ("rejected", "c"))},
            "Why?",
        ),
        (
            {
                c: f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant: {t}"
                for c, t in (("chosen", "b"), ("rejected", "c"))
            },
            LONG,
        ),
    ],
    ids=["texts", "chat", "replies", "follow", "chats", "both", "sharegpt", "json", "dialogue"],
)
def test_the_forms_of_a_pair(load, row, prompt):
    assert load(row) == [PreferenceRow(prompt, "b", "c")]


def test_a_speaker_who_is_named_again_goes_on_speaking(load):
    """Answers of HH-RLHF that go on with another turn of their own."""
    begin = "\n\nHuman: Why?\n\nAssistant:"
    (row,) = load(
        {
            "chosen": f"{begin} Human: because.\n\nAssistant:  So it is.",
            "rejected": f"{begin} No.",
        }
    )
    assert row == PreferenceRow("Why?", "Human: because.\n\nAssistant:  So it is.", "No.")
    (row,) = load(
        {
            "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant:",
        }
    )
    assert row == PreferenceRow("a\n\nHuman: b", "c", "")


def test_columns_of_other_names_and_other_rows(load):
    row = {"question": "Why?", "good": "b", "bad": "c", "split": "train"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load(row, {**row, "split": "test"}, **names) == [PreferenceRow("Why?", "b", "c")]


def test_a_system_message_is_dropped_where_it_is_asked(load):
    row = {"chosen": [SYSTEM, USER, answer("b")], "rejected": [SYSTEM, USER, answer("c")]}
    (kept,) = load(row)
    assert kept.prompt == Conversation((("system", "Be brief."),), "Why?")
    assert load(row, system="drop") == [PreferenceRow("Why?", "b", "c")]


PAIR = {"prompt": "Why?", "chosen": "b", "rejected": "c"}


def test_pairs_of_one_answer_twice_are_left_out_and_counted(load, caplog):
    assert load(PAIR, {**PAIR, "rejected": " b "}) == [PreferenceRow("Why?", "b", "c")]
    assert caplog.messages == [
        "pairs.jsonl: 1 of 2 pairs have the same answer twice, and are left out"
    ]
    with pytest.raises(DataError, match=r"1 of 1 pairs .* none is left to learn from"):
        load({**PAIR, "rejected": "b"})


def test_a_row_keeps_its_columns(load):
    rows = load({**PAIR, "safe_prompt": "Why not?", "harmful": True}, PAIR)
    assert [row.columns.get("safe_prompt") for row in rows] == ["Why not?", None]
    assert rows[0].columns["harmful"] is True


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "Why?", "chosen": "b"}, "no column 'rejected'; there are"),
        ({**PAIR, "rejected": None}, "column 'rejected': expected an answer, got null"),
        ({**PAIR, "chosen": 3}, "column 'chosen': expected text or a chat, got int"),
        ({**PAIR, "rejected": 3}, "column 'rejected': expected text or a chat, got int"),
        ({**PAIR, "rejected": answer("c")}, "column 'rejected': expected text or a chat, got dict"),
        ({**PAIR, "prompt": " "}, "column 'prompt': expected text or a chat, got an empty"),
        ({**PAIR, "chosen": "\ud800"}, r"column 'chosen': lone surrogate U\+D800"),
        ({**PAIR, "chosen": [answer("b")]}, "both as text or both as chats, got one of each"),
        (
            {**PAIR, "prompt": [USER, answer("x")]},
            "column 'prompt': expected a chat that ends in what is answered, got an answer",
        ),
        ({**PAIR, "chosen": [USER], "rejected": [USER]}, r"ends in an answer, got the roles \['us"),
        ({**PAIR, "chosen": [], "rejected": []}, r"ends in an answer, got the roles \[\]"),
        (
            {"chosen": [USER, answer("b")], "rejected": [OTHER, answer("c")]},
            "alike up to their last turn, and they part before it",
        ),
        (
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: b",
                "rejected": "\n\nHuman: How?\n\nAssistant: c",
            },
            "alike up to their last turn",
        ),
        (
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: b\n\nHuman: So?\n\nAssistant: d",
                "rejected": "\n\nHuman: Why?\n\nAssistant: c",
            },
            "alike up to their last turn",
        ),
        ({"chosen": "b", "rejected": "c"}, "or dialogues that begin with 'Human:'"),
        ({"chosen": "x\n\nHuman: a\n\nAssistant: b", "rejected": "x"}, "or dialogues that begin"),
        (
            {c: f"\n\nAssistant: a\n\nHuman: \n\nAssistant: {c}" for c in ("chosen", "rejected")},
            "expected text or a chat, got an empty string as last user turn",
        ),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "chosen": "b", "rejected": "c"},
            "column 'prompt': expected a chat with a user turn",
        ),
    ],
)
def test_rows_that_are_refused_are_named(load, row, line):
    with pytest.raises(DataError, match=rf"^pairs.jsonl, line 2.*{line}"):
        load(PAIR, row)
