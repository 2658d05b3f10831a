"""Rows of a file, whatever wrote it: JSON, JSON Lines, CSV and its kin, Parquet; plain or in gzip.

What a file holds is read off its content where that is certain: UTF-8 or UTF-16, an array or an
object a line, what separates the columns. A guess that could be wrong is an error instead.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.files import check_fetched
from alignpro.optional import import_for
from alignpro.types import type_name

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LINES = (".jsonl", ".ndjson")
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_LONGEST_FIELD = 2**31 - 1  # csv's own limit is 131072 characters, less than a long document


class DataError(ValueError):
    """Data that cannot be read as asked: the line says where, what was expected and what came."""


class NoColumnError(DataError):
    """Rows without a column that is wanted of them.

    problem: says where, and which columns there are. key: by which another one is named.
    """

    def __init__(self, problem: str, key: str) -> None:
        super().__init__(f"{problem}; name the one that is meant as {key}")
        self.problem = problem


@dataclass(frozen=True)
class Row:
    place: str  # "prompts.jsonl, line 3"
    values: Mapping[str, Any]


def suffix_of(name: str | Path) -> str:
    """That of the format, in lower case: ".csv" of "prompts.CSV.gz"."""
    path = Path(str(name).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_file(path: Path, name: str) -> list[Row]:
    """All rows in order. name: what errors call the file.

    Raises:
        DataError: no file of ``SUFFIXES``, or one that is malformed. ImportError: Parquet without
            pyarrow.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{name}: expected a file ending in {', '.join(SUFFIXES)}, or one of them and .gz, got "
            f"{suffix!r}"
        )
    try:
        check_fetched(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    data = path.read_bytes()
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{name}: no readable gzip file: {error}") from error
    if suffix == ".parquet":
        return _read_parquet(data, name)
    text = _decode(data, name)
    if suffix in (".csv", ".tsv"):
        return list(_read_table(text, name, "\t" if suffix == ".tsv" else None))
    return list(_read_json(text, name, lines=suffix in _LINES))


def _decode(data: bytes, name: str) -> str:
    if data.startswith(_ZIP):
        raise DataError(
            f"{name}: a ZIP archive, as a spreadsheet (.xlsx) is one; save its table as CSV in "
            "UTF-8, or unpack it"
        )
    encoding = json.detect_encoding(data)  # by the byte order mark, or the NULs of ASCII
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise DataError(f"{name}: no valid {encoding.upper()}: {error}") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is no valid UTF-8; save the file "
            "as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{name}, line {line}: a NUL character; save the file as UTF-8 text")
    return text


# JSON


def _read_json(text: str, name: str, *, lines: bool) -> Iterator[Row]:
    """lines: whether the name says JSON Lines, for what is neither that nor one document."""
    begin = text.lstrip()
    if begin.startswith("["):
        yield from _as_rows(_parse_json(text, name), name)
        return
    # Line feeds alone: str.splitlines also splits at characters that JSON allows in strings.
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not _is_json(numbered[0][1] if numbered else "{}") and (_is_json(text) or not lines):
        yield from _rows_of_object(_parse_json(text, name), name)
        return
    rows = []
    for number, line in numbered:
        place = f"{name}, line {number}"
        rows.append(Row(place, _as_object(_parse_json(line, name, number), place)))
    if len(rows) == 1:
        yield from _rows_of_object(rows[0].values, name, rows[0].place)
    else:
        yield from rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return True  # which the reader says
    except json.JSONDecodeError:
        return False
    return True


def _rows_of_object(values: Any, name: str, place: str | None = None) -> Iterator[Row]:
    """Of a file that is one object: the rows in the list that it holds, or itself as the only row.
    place: of that row."""
    lists = {
        key: items
        for key, items in _as_object(values, name).items()
        if isinstance(items, list)
        and items
        and all(isinstance(item, dict) and not item.keys() & {"role", "from"} for item in items)
    }
    if len(lists) > 1 and "data" not in lists:
        raise DataError(
            f"{name}: expected one list of rows, got an object with the lists {sorted(lists)}; "
            "write the one that is meant to a file"
        )
    columns = list(values.values())
    if lists:
        yield from _as_rows(lists.get("data", next(iter(lists.values()))), name)
    elif columns and all(
        isinstance(c, dict) and list(c) == list(columns[0]) and not c.keys() & {"role", "from"}
        for c in columns
    ):
        # What pandas writes where nothing else is said: of each column its values by row.
        for label in columns[0]:
            row = {key: column[label] for key, column in values.items()}
            yield Row(f"{name}, row {label}", row)
    else:
        yield Row(place or f"{name}, row 0", values)


def _as_rows(items: list[Any], name: str) -> Iterator[Row]:
    for index, values in enumerate(items):
        place = f"{name}, row {index}"
        yield Row(place, _as_object(values, place))


def _parse_json(text: str, name: str, line: int = 1) -> Any:
    """line: the number of the text's first."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except _RepeatedKeyError as error:
        problem = f"key {error.args[0]!r} appears twice in an object"
    except json.JSONDecodeError as error:
        line, problem = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    raise DataError(f"{name}, line {line}: malformed JSON: {problem}")


class _RepeatedKeyError(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return values


def _as_object(values: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{place}: expected an object with columns, got {type_name(values)}")
    return values


# Tables


def _read_table(text: str, name: str, delimiter: str | None) -> Iterator[Row]:
    """delimiter: None finds it."""
    first, _, rest = text.partition("\n")
    before = 0  # lines that are no row
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own word
        text, delimiter, before = rest, first.strip()[4], 1
    delimiter = delimiter or _delimiter(text)
    header: list[str] | None = None
    for line, fields in _records(text, name, delimiter, before):
        place = f"{name}, line {line}"
        if header is None:
            header = [column.strip() for column in fields]
            repeated = [column for column in header if column and header.count(column) > 1]
            if repeated:
                raise DataError(f"{place}: column {repeated[0]!r} appears twice")
        elif len(fields) != len(header):
            raise DataError(
                f"{place}: expected {len(header)} columns, got {len(fields)}; "
                f"{_DELIMITERS.get(delimiter, repr(delimiter))} are between them, and a text that "
                "holds one needs quotes around it"
            )
        else:
            # A column without a name is a spreadsheet's margin, or the index of a data frame.
            yield Row(place, {c: v for c, v in zip(header, fields, strict=True) if c})


def _records(
    text: str, name: str, delimiter: str, before: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Every record that is not blank (a spreadsheet's has its separators), with the number of its
    first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = before + reader.line_num + 1
        try:
            with _long_fields():
                fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}, line {line}: malformed CSV: {error}") from error
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield line, fields


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv's limit belongs to the process: another reader's stays what it was."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter(text: str) -> str:
    """What separates the columns: what parts the header, and every row into as many.

    `csv.Sniffer` goes by how often characters occur in the rows, where prose has commas of its own.
    """

    def widths(delimiter: str) -> Iterator[int]:
        try:
            yield from (len(fields) for _, fields in _records(text, "", delimiter))
        except DataError:
            yield 0  # malformed under this one

    found = [d for d in _DELIMITERS if next(widths(d), 0) > 1]
    if len(found) > 1:
        found = [d for d in found if len(set(widths(d))) == 1] or found
    return found[0] if found else ","


def _read_parquet(data: bytes, name: str) -> list[Row]:
    parquet = import_for("reading Parquet files", "pyarrow.parquet", "alignpro[parquet]")
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{name}: no readable Parquet file: {first_line(error)}") from error
    return [Row(f"{name}, row {index}", values) for index, values in enumerate(rows)]


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
