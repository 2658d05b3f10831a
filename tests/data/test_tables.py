"""What other tools write into tables, and system messages that are not wanted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from alignpro.config import DataConfig
from alignpro.data import DataError, PromptRow, load_prompts
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


TALK = [{"role": "user", "content": 'say "}\\n {" \\\\'}, {"role": "assistant", "content": "it's"}]
TALK.append({"role": "user", "content": "x" * 90})


def printed_by_numpy(items):
    """As pandas' `to_csv` writes the lists of a Parquet file or a Dataset."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return str(array)


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_cell_holds_messages_as_numpy_prints_them(write, column):
    written = printed_by_numpy(TALK)
    assert "}\n {" in written or "} {" in written  # no comma
    cell = written.replace('"', '""')
    (row,) = load_prompts(write("a.csv", f'{column}\n"{cell}"\n'))
    assert row.prompt.messages == TALK


@pytest.mark.parametrize("written", ['["a\'s", "b"]', """["a's", 'b']""", """["a's" 'b']"""])
def test_a_cell_holds_turns(write, written):
    cell = written.replace('"', '""')
    (row,) = load_prompts(write("a.csv", f'turns\n"{cell}"\n'))
    assert row == PromptRow("a's", {"turns": ["a's", "b"]})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TALK)[:-30],
        json.dumps(TALK)[:60],
        repr(TALK)[:-1],
        "[{'role': 'user', 'content': array([{'type': 'text', 'text': 'a'}], dtype=object)}]",
    ],
)
def test_a_part_of_messages_is_no_prompt(write, text):
    with pytest.raises(DataError, match=r"line 1, column 'prompt': expected messages as JSON, got"):
        load_prompts(write("a.jsonl", jsonl([{"prompt": text}])))
    question = json.dumps(TALK) + " What is wrong with that?"
    (row,) = load_prompts(write("a.jsonl", jsonl([{"prompt": question}])))
    assert row.prompt == question


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


def test_messages_of_an_arrow_table_with_a_list_of_each(write):
    openai = {"role": ["system", "user"], "content": ["Be kind.", "it's [1]"]}
    share = {"from": ["system", "human"], "value": ["Be kind.", "it's [1]"]}
    rows = [{"messages": openai}, {"conversations": share}]
    for row in load_prompts(write("a.jsonl", jsonl(rows))):
        assert row.prompt.messages == CHAT
    with pytest.raises(DataError, match="expected text or a chat, got dict"):
        load_prompts(write("a.jsonl", jsonl([{"messages": CHAT[1]}])))


@pytest.mark.parametrize("column", ["history", "images", "videos", "audios", "tools"])
@pytest.mark.parametrize("row", [{"prompt": "x"}, {"messages": CHAT}])
def test_what_belongs_to_a_prompt_and_is_not_read_is_refused(write, row, column):
    assert len(load_prompts(write("a.jsonl", jsonl([{**row, column: []}, {**row, column: None}]))))
    with pytest.raises(DataError, match=rf"line 2, .*: '{column}' beside it is a part of the"):
        load_prompts(write("a.jsonl", jsonl([row, {**row, column: ["x"]}])))


def test_what_belongs_to_a_message_of_sharegpt_is_refused_too(write):
    share = [{"from": "human", "value": "x", "videos": ["x.mp4"]}]
    with pytest.raises(DataError, match="message 0: expected text alone, got 'videos' beside it"):
        load_prompts(write("a.jsonl", jsonl([{"conversations": share}])))


def test_rows_in_memory_are_no_source():
    with pytest.raises(DataError, match="source: expected a path or a DataConfig, got list; rows"):
        load_prompts([{"prompt": "x"}])
