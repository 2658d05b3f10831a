"""Rows of files as other programs write them: encodings, separators, shapes of JSON, gzip."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from alignpro.data import DataError, PromptRow, load_prompts

TABLE = "prompt,answer\r\nBake bread,flour\r\n"
EXPECTED = [PromptRow("Bake bread", {"answer": "flour"})]
LINES = '{"prompt": "hi"}\n{"prompt": "ho"}\n'


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return load_prompts(name)

    return read


def test_what_pandas_writes_where_nothing_else_is_said(read):
    frame = {"prompt": {"0": "hi", "1": "ho"}, "answer": {"0": "a", "1": None}}
    assert read("a.json", json.dumps(frame)) == [
        PromptRow("hi", {"answer": "a"}),
        PromptRow("ho", {"answer": None}),
    ]
    with pytest.raises(DataError, match="column 'messages': expected text or a chat, got dict"):
        read("b.json", '{"messages": {"role": "user", "content": "hi"}}')


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_git_lfs_left_in_the_place_of_a_file_is_said(read, name):
    with pytest.raises(DataError, match=f"{name}: not the file itself but a Git LFS pointer"):
        read(name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def test_a_spreadsheet_that_is_called_a_table_is_said(read):
    with pytest.raises(DataError, match=r"a.csv: a ZIP archive, as a spreadsheet \(.xlsx\) is one"):
        read("a.csv", b"PK\x03\x04\x14\x00\x06\x00")


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_what_separates_columns_is_read_off_the_header(read, delimiter):
    assert read("a.csv", TABLE.replace(",", delimiter)) == EXPECTED


def test_separators_in_the_texts_are_no_separators(read):
    assert read("a.csv", 'prompt,answer\n"a; b; c",d\n"e; f",g\n')[0].prompt == "a; b; c"
    assert read("b.csv", "prompt;answer\na, b, c;d\n")[0].prompt == "a, b, c"
    assert read("c.csv", 'prompt\n"Hello; you, there"\n')[0].prompt == "Hello; you, there"
    # A header that two of them part: the one that parts every row alike.
    assert read("d.csv", "prompt;answer, short\nhi;yo\n") == [
        PromptRow("hi", {"answer, short": "yo"})
    ]


def test_tabs_in_a_tsv_and_the_separator_that_excel_names(read):
    assert read("a.tsv", TABLE.replace(",", "\t")) == EXPECTED
    assert read("b.tsv", "prompt\nBake, bread\n")[0].prompt == "Bake, bread"
    (row,) = read("c.csv", "sep=;\r\n" + TABLE.replace(",", ";"))
    assert (row, row.place) == (EXPECTED[0], "c.csv, line 3")


def test_a_row_of_another_width_names_its_line_and_the_separator(read):
    with pytest.raises(DataError, match=r"a.csv, line 4: expected 2 columns, got 3; semicolons"):
        read("a.csv", 'prompt;answer\n"two\nlines";x\na;b;c\n')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_encodings_that_say_what_they_are(read, encoding):
    assert read("a.csv", TABLE.encode(encoding)) == EXPECTED
    assert [row.prompt for row in read("a.jsonl", LINES.encode(encoding))] == ["hi", "ho"]


def test_encodings_that_cannot_be_told_are_refused(read):
    with pytest.raises(DataError, match=r"a.csv, line 2: byte 0xe9 is no valid UTF-8; save .* as"):
        read("a.csv", "prompt,answer\ncafé,yo\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a.csv, line 2: a NUL character"):
        read("a.csv", b"prompt\nh\0i\n")
    with pytest.raises(DataError, match=r"a.csv: no valid UTF-16"):
        read("a.csv", TABLE.encode("utf-16")[:-1])


def test_long_fields_and_the_limit_of_others(read):
    before = csv.field_size_limit()
    (row,) = read("a.csv", f'prompt,answer\n"{"x" * 200_000}",yo\n')
    assert len(row.prompt) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_is_read_by_what_it_holds(read, name):
    rows = [{"prompt": "hi"}, {"prompt": "ho"}]
    for content in (
        LINES,
        "\n" + LINES.replace("\n", "\r\n"),
        json.dumps(rows),
        json.dumps(rows, indent=2),
        json.dumps({"data": rows}),
        json.dumps({"version": "1.0", "data": rows, "authors": [{"name": "x"}]}, indent=2),
        json.dumps({"examples": rows}),
    ):
        assert [row.prompt for row in read(name, content)] == ["hi", "ho"], content


def test_one_object_is_a_row(read):
    chat = [{"role": "user", "content": "hi"}]
    assert read("a.json", json.dumps({"messages": chat}, indent=1))[0].prompt == "hi"
    assert read("a.jsonl", json.dumps({"prompt": "hi"}))[0].place == "a.jsonl, line 1"


def test_an_object_with_several_lists_is_refused(read):
    rows = [{"prompt": "hi"}]
    with pytest.raises(DataError, match=r"a.json: expected one list .* lists \['test', 'train'\]"):
        read("a.json", json.dumps({"train": rows, "test": rows}))


def test_gzip_of_anything(read):
    for name, content in {
        "a.csv.gz": TABLE.encode(),
        "b.TSV.GZ": TABLE.replace(",", "\t").encode("utf-16"),
        "c.jsonl.gz": b'{"prompt": "Bake bread", "answer": "flour"}',
        "d.csv": TABLE.encode(),  # by its content
    }.items():
        assert read(name, gzip.compress(content)) == EXPECTED, name
    with pytest.raises(DataError, match=r"a.csv.gz: no readable gzip file"):
        read("a.csv.gz", gzip.compress(TABLE.encode())[:-9])
    with pytest.raises(DataError, match=r"a.txt.gz: expected a file ending in .*got '.txt'"):
        read("a.txt.gz", gzip.compress(b"hi"))


def test_parquet_in_gzip(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "hi"}]), tmp_path / "a.parquet")
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert load_prompts(packed) == [PromptRow("hi")]
