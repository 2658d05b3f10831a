"""Rows too long for a model: named by their place, left out or cut, before anything is computed."""

from __future__ import annotations

import pytest

from alignpro.config import Prompting
from alignpro.data import PromptRow
from alignpro.lengths import fit_rows, unread_by
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import WeightedSum
from alignpro.types import Conversation, SamplingParams
from fake_model import FakeModel

# A token of FakeModel is a byte; around a user turn it writes two.
WRITES = {
    "rewrite_params": SamplingParams(max_new_tokens=5),
    "response_params": SamplingParams(max_new_tokens=10),
}
PROMPTING = Prompting(template="Q: {prompt}", separator="--")


def pipeline(prompter=1000, target=1000, prompting=PROMPTING):
    reads, answers = FakeModel("p", context_length=prompter), FakeModel("t", context_length=target)
    return Pipeline(reads, answers, None, prompting=prompting, **WRITES)


def rows(*prompts):
    return [PromptRow(p, {"n": i}, f"a.csv, line {i + 2}") for i, p in enumerate(prompts)]


def fit(given, on_too_long="error", texts=(), rewrites=True, **models):
    unread = unread_by(pipeline(**models), rewrites=rewrites, texts=texts)
    return fit_rows(given, unread, on_too_long)


def test_the_row_is_named_with_the_model_and_the_remedy():
    given = rows("short", "x" * 90, "y" * 90)
    line = (
        r"^a.csv, line 3: in the prompter's template: 95 tokens and 5 new ones exceed the context "
        r"of p \(99 tokens\).* \(2 of 3 rows; on_too_long takes skip or cut as well\)$"
    )
    with pytest.raises(ValueError, match=line):
        fit(given, prompter=99)
    assert fit(given, prompter=100).rows == given


def test_the_target_reads_the_prompt_with_the_longest_rewrite():
    given = rows("x" * 90)
    # 2 around, 90, the separator's 2, 5 of a rewrite, 10 of a response.
    assert fit(given, target=109).rows == given
    with pytest.raises(ValueError, match=r"in the target's template, with the longest rewrite: 99"):
        fit(given, target=108)
    # A text that is put behind every prompt, as an arm does.
    assert fit(given, texts=["brief"], target=109).rows == given
    with pytest.raises(ValueError, match=r"100 tokens and 10 new ones exceed the context of t"):
        fit(given, texts=["briefs"], target=109)
    # Alone, where the target itself is trained.
    assert fit(given, rewrites=False, target=102).rows == given
    with pytest.raises(ValueError, match=r"a.csv, line 2: in the target's template: 92 tokens"):
        fit(given, rewrites=False, target=101)


def test_a_rewrite_in_the_place_of_the_prompt():
    prompting = Prompting(mode="rewrite", template="Q: {prompt}")
    assert fit(rows("x" * 90), target=102, prompting=prompting).cut == []
    with pytest.raises(ValueError, match="in the target's template"):
        fit(rows("x"), target=17, prompting=prompting)  # 3 for one character, 5 and 10
    assert fit(rows("x"), target=18, prompting=prompting).cut == []


def test_what_is_surely_short_is_not_encoded(monkeypatch):
    made = pipeline()
    unread = unread_by(made)
    assert unread(rows("x" * 100)[0]) is None
    monkeypatch.setattr(made.prompter.tokenizer, "encode_chat", None, raising=False)
    monkeypatch.setattr(made.target.tokenizer, "encode_chat", None, raising=False)
    assert unread(rows("y" * 200)[0]) is None
    with pytest.raises(TypeError):  # it would have to look
        unread(rows("y" * 600)[0])


def test_skipped_rows_are_counted_and_said(caplog):
    given = rows("x" * 90, "short", "y" * 90)
    found = fit(given, "skip", prompter=99)
    assert found.rows == given[1:2]
    assert found.skipped == ["a.csv, line 2", "a.csv, line 4"]
    said = "2 of 3 rows were too long for a model, and left out: a.csv, line 2; a.csv, line 4"
    assert found.note == said and said in caplog.text
    with pytest.raises(ValueError, match=r"a.csv, line 2: .*\(2 of 2 rows\)"):
        fit([given[0], given[2]], "skip", prompter=99)
    assert fit(given, "skip").note is None


def test_cut_takes_the_oldest_turns_first():
    history = (
        ("system", "Be kind."),
        ("user", "a" * 30),
        ("assistant", "b" * 30),
        ("user", "c" * 30),
        ("assistant", "d" * 30),
    )
    given = rows(Conversation(history, "Why?"))
    (row,) = fit(given, "cut", rewrites=False, target=130).rows
    assert row.prompt == Conversation((history[0], *history[3:]), "Why?")
    (row,) = fit(given, "cut", rewrites=False, target=60).rows
    assert row.prompt == Conversation(history[:1], "Why?")
    assert (row.columns, row.place) == ({"n": 0}, "a.csv, line 2")


def test_cut_then_takes_the_middle_of_the_last_turn():
    text = "Sum this up: " + "word " * 40 + "In one line."
    found = fit(rows(text, "short"), "cut", rewrites=False, target=80)
    turn = found.rows[0].prompt
    assert len(turn) + 2 + 10 <= 80 and len(turn) > 60  # as much as fits
    assert turn.startswith("Sum this up: word") and turn.endswith("word In one line.")
    assert " [...] " in turn
    assert found.cut == ["a.csv, line 2"] and found.rows[1].prompt == "short"
    assert found.note == "1 of 2 rows were too long for a model, and cut: a.csv, line 2"


def test_where_nothing_is_left_to_cut():
    conversation = Conversation((("system", "s" * 90),), "Why?")
    with pytest.raises(ValueError, match=r"a.csv, line 2: .* nothing of the prompt is left to cut"):
        fit(rows(conversation), "cut", rewrites=False, target=60)


def test_rows_without_a_place_have_a_number():
    with pytest.raises(ValueError, match=r"^prompt 1: in the prompter's"):
        fit([PromptRow("a"), PromptRow("x" * 99)], prompter=50)


# --- what rewards read ---


class Reads:
    """A reward that reads the source, a token a character, in a context of 60."""

    def unread_by(self, params):
        def unread(prompt, columns):
            size = len(columns.get("source", "")) + params.max_new_tokens
            return None if size <= 60 else f"for reward 'reads': {size} tokens"

        return unread

    def __call__(self, prompts, rewrites, responses, **columns):
        return [0.0] * len(prompts)


def test_a_row_that_a_reward_cannot_read():
    made = pipeline()
    given = [PromptRow("short", {"source": "s" * n}, f"line {n}") for n in (50, 51)]
    other = WeightedSum({"reads": (1.0, Reads())})
    for reads, also in ((made, [Reads()]), (made, [other]), (scored(made, other), [])):
        unread = unread_by(reads, scored_by=also)
        assert fit_rows(given, unread, "skip").rows == given[:1]
        with pytest.raises(ValueError, match=r"^line 51: for reward 'reads': 61 tokens \(1 of 2"):
            fit_rows(given, unread, "error")
        with pytest.raises(ValueError, match=r"line 51: .*nothing of the prompt is left to cut"):
            fit_rows(given, unread, "cut")
        assert unread_by(reads, scored_by=also, responses=False)(given[1]) is None


def scored(made, reward):
    return Pipeline(made.prompter, made.target, reward, prompting=PROMPTING, **WRITES)


@pytest.mark.parametrize(
    ("begin", "end", "left"),
    [
        (3, 205, "defghijklmnopqrstuvwxyz [...] bcdefghijklmnopqrstuvw"),  # around the cut
        (20, 100, "uvwxyz [...]"),
        (100, 190, "[...] bcdefgh"),
        (100, 160, "[...]"),
        (3, 6, "def"),  # as it was
    ],
)
def test_a_source_is_cut_with_the_turn_that_it_stands_in(begin, end, left):
    letters = "abcdefghijklmnopqrstuvwxyz"
    turns = [letters + "-" * 156 + letters, "something else"]
    given = [PromptRow(turn, {"source": turns[0][begin:end], "n": 1}) for turn in turns]
    cut, other = fit(given, "cut", rewrites=False, target=70).rows
    assert cut.prompt == letters + " [...] " + letters[1:]
    assert cut.columns == {"source": left, "n": 1} and left in cut.prompt
    assert other.columns == given[1].columns
