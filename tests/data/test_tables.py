"""What other tools write into tables, and system messages that are not wanted."""

from __future__ import annotations

import json

import pytest

from alignpro.config import DataConfig
from alignpro.data import PromptRow, load_prompts
from alignpro.types import Conversation


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        return name

    return write


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "it's [1]"}]


@pytest.mark.parametrize("written", [json.dumps(CHAT), repr(CHAT)])
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_tables_cell_holds_messages_as_text(write, column, written):
    cell = written.replace('"', '""')
    (row,) = load_prompts(write("a.csv", f'{column},level\n"{cell}",3\n'))
    assert row.prompt == Conversation((("system", "Be kind."),), "it's [1]")
    assert row.is_chat and row.columns == {"level": "3"}


@pytest.mark.parametrize("text", ["[1] What is this?", "[]", '["a", "b"]', '[{"x": 1}]', "[" * 999])
def test_other_text_that_begins_with_a_bracket_is_text(write, text):
    assert [row.prompt for row in load_prompts(write("a.jsonl", jsonl([{"prompt": text}])))] == [
        text
    ]


def test_system_messages_are_left_out_on_request(write):
    name = write("a.jsonl", jsonl([{"prompt": CHAT}, {"prompt": CHAT[1:]}]))
    kept, alone = load_prompts(DataConfig(name))
    assert [kept.prompt.history, alone.prompt] == [(("system", "Be kind."),), "it's [1]"]
    assert [row.prompt for row in load_prompts(DataConfig(name, system="drop"))] == ["it's [1]"] * 2


def test_what_a_spreadsheet_leaves_around_a_table(write):
    """Names with spaces, margins, the index of a data frame, rows of separators alone."""
    table = ",prompt , answer,,\n0,hi, yo,,\n,,,,\n1,ho,,,x\n , ,,,\n"
    assert load_prompts(write("a.csv", table)) == [
        PromptRow("hi", {"answer": " yo"}),
        PromptRow("ho", {"answer": ""}),
    ]
