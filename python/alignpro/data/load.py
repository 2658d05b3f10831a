"""Reading prompts and (prompt, instruction) pairs from files, the package's own data, or the hub.

A source is one of
* a file: .jsonl, .json (an array of objects), .csv (with a header) or .parquet, in UTF-8;
* the name of data that the package ships: "everyday" and "house_rules" (prompts), "instructions"
  and "house_rules_warm_start" (pairs);
* the name of a data set on the hub, "owner/name", read through the package ``datasets``.

Errors are DataError, one line that names the source, the line or row, and the column.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpro.optional import import_for
from alignpro.types import Conversation, Message, Prompt, text_messages, type_name

PACKAGED = {
    "everyday": "everyday_prompts.jsonl",
    "instructions": "instructions.jsonl",
    "house_rules": "house_rules.jsonl",
    "house_rules_warm_start": "house_rules_warm_start.jsonl",
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "turns")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class DataError(ValueError):
    """Data that cannot be read as asked: the line says where, what was expected and what came."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the other columns of its row, which rewards may use."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    place: str  # "prompts.jsonl, line 3"
    values: Mapping[str, Any]


def load_prompts(
    source: str | Path, column: str | None = None, split: str | None = None
) -> list[PromptRow]:
    """Rows of ``source`` with their prompt, in the order of the source.

    A prompt is text, or a conversation that ends in a user turn: a list of
    ``{"role": "system" | "user" | "assistant", "content": text}``, or ShareGPT's
    ``{"from": "human" | "gpt" | "system", "value": text}``. Content may be parts of type "text". An
    answer after the last user turn is no part of the prompt; where it is one message, it is the
    column "reference" of rows that have none. A column "turns" holds the user's turns alone
    (MT-Bench): the later ones refer to answers that nobody has given, so the first is the prompt,
    and the column stays among the others for the reward.

    column: where the prompt is; None takes the first of ``PROMPT_COLUMNS`` that a row has.
    split: keeps the rows whose "split" column equals it; on the hub it names the split to read
    (there None reads "train").

    Raises DataError for a source that is not there, is malformed, or has no rows left; for a row
    without the column; for a prompt that is empty, has the wrong type or a lone surrogate; for
    messages with another role or what is no text (images, tool calls).
    """
    prompts = []
    for row in _read(source, split):
        name, prompt, reply = _prompt_of(row, column)
        columns = {key: value for key, value in row.values.items() if key != name}
        if name == "turns":
            columns[name] = row.values[name]
        if reply is not None:
            columns.setdefault("reference", reply)
        prompts.append(PromptRow(prompt, columns))
    return prompts


def load_pairs(
    source: str | Path,
    prompt_column: str | None = None,
    instruction_column: str = "instruction",
    split: str | None = None,
) -> list[tuple[Prompt, str]]:
    """Rows of ``source`` as (prompt, instruction); sources and errors as in ``load_prompts``, but
    an instruction may be "", which leaves the prompt as it is."""
    return [
        (_prompt_of(row, prompt_column)[1], _text_of(row, instruction_column))
        for row in _read(source, split)
    ]


def load_instructions(source: str | Path) -> list[str]:
    """The distinct texts of the column "instruction", in order; pairs that leave the prompt alone
    ("") have none. Sources and errors as in ``load_prompts``."""
    texts = (_text_of(row, "instruction").strip() for row in _read(source, None))
    return [text for text in dict.fromkeys(texts) if text]


def stack_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """The rows' other columns as lists aligned with ``rows``; None where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def _text_of(row: _Row, column: str) -> str:
    value, where = _value_of(row, column), f"{row.place}, column {column!r}"
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {type_name(value)}")
    if value and not value.strip():
        raise DataError(f"{where}: expected text, got white space alone")
    _check_unicode(value, where)
    return value


def _value_of(row: _Row, column: str) -> Any:
    if column not in row.values:
        raise DataError(f"{row.place}: no column {column!r}; there are {sorted(row.values)}")
    return row.values[column]


def _prompt_of(row: _Row, column: str | None) -> tuple[str, Prompt, str | None]:
    """The prompt's column, the prompt, and the answer that stands after it, if one does."""
    if column is None:
        there = [name for name in PROMPT_COLUMNS if name in row.values]
        column = there[0] if there else PROMPT_COLUMNS[0]
    value, where = _value_of(row, column), f"{row.place}, column {column!r}"
    try:
        if column in PROMPT_COLUMNS[1:] and isinstance(value, str):
            raise ValueError("expected a list, got text; a prompt as text is in 'prompt'")
        if column == "turns":
            prompt, reply = Conversation.of(_first_turn(value)), None
        elif isinstance(value, str):
            prompt, reply = Conversation.of(value), None
        else:
            prompt, reply = _up_to_last_user_turn(text_messages(_openai_form(value)))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    for message in prompt.messages:
        _check_unicode(message["content"], where)
    return column, prompt.short, reply


def _up_to_last_user_turn(messages: Sequence[Message]) -> tuple[Conversation, str | None]:
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise ValueError(f"expected a chat with a user turn, got the roles {roles}")
    end = len(roles) - roles[::-1].index("user")
    after = messages[end:]
    if any(message["role"] != "assistant" for message in after):
        raise ValueError(
            f"expected a chat that ends in a user turn, or in the answer to it, got roles {roles}"
        )
    return Conversation.of(messages[:end]), after[0]["content"] if len(after) == 1 else None


def _openai_form(chat: Any) -> Any:
    """ShareGPT's messages as {"role", "content"}; others as they are."""
    if not isinstance(chat, Sequence) or isinstance(chat, (str, bytes)):
        return chat
    messages = []
    for index, message in enumerate(chat):
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            role = _SHAREGPT_ROLES.get(message["from"])
            if role is None:
                known = ", ".join(_SHAREGPT_ROLES)
                raise ValueError(
                    f"message {index}: expected 'from' to be one of {known}, got "
                    f"{message['from']!r}"
                )
            message = {"role": role, "content": message["value"]}
        messages.append(message)
    return messages


def _first_turn(turns: Any) -> Any:
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(t, str) for t in turns):
        raise ValueError(f"expected a list of the user's turns as text, got {type_name(turns)}")
    return turns[0]


def _check_unicode(value: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: lone surrogate U+{ord(value[error.start]):04X} at character {error.start}; "
            "expected valid Unicode"
        ) from error


# Sources


def _read(source: str | Path, split: str | None) -> list[_Row]:
    """All rows of a source, after the split was taken; never empty."""
    name, path = str(source), Path(source)
    if name in PACKAGED and not path.exists():
        path = Path(__file__).with_name(PACKAGED[name])
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            expected = f"a file ending in {', '.join(SUFFIXES)}"
            raise DataError(f"{name}: expected {expected}, got {suffix!r}")
        read = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
        rows = _take_split(list(read.get(suffix, _read_parquet)(path, name)), split, name)
    elif path.exists() or path.suffix.lower() in SUFFIXES:
        problem = "is a folder" if path.exists() else "there is no such file"
        raise DataError(f"{name}: {problem}; expected a file ({', '.join(SUFFIXES)})")
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        rows = list(_read_hub(name, split or "train"))
    else:
        raise DataError(
            f"{name}: expected a file ({', '.join(SUFFIXES)}), one of the package's own "
            f"({', '.join(PACKAGED)}), or a hub data set 'owner/name'"
        )
    if not rows:
        raise DataError(f"{name}: no rows" + (f" in split {split!r}" if split else ""))
    return rows


def _take_split(rows: list[_Row], split: str | None, name: str) -> list[_Row]:
    if split is None:
        return rows
    for row in rows:
        if "split" not in row.values:
            raise DataError(f"{row.place}: no column 'split', though split {split!r} was asked for")
    kept = [row for row in rows if row.values["split"] == split]
    if rows and not kept:
        there = sorted({str(row.values["split"]) for row in rows})
        raise DataError(f"{name}: no rows in split {split!r}; there are {there}")
    return kept


def _read_text(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is no valid UTF-8"
        ) from error


def _read_jsonl(path: Path, name: str) -> Iterator[_Row]:
    # Line feeds alone: str.splitlines also splits at characters that JSON allows in strings.
    for number, line in enumerate(_read_text(path, name).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        yield _Row(place, _as_object(_parse_json(line, name, number), place))


def _read_json(path: Path, name: str) -> Iterator[_Row]:
    rows = _parse_json(_read_text(path, name), name)
    if not isinstance(rows, list):
        raise DataError(f"{name}: expected an array of objects, got {type_name(rows)}")
    for index, values in enumerate(rows):
        yield _Row(f"{name}, row {index}", _as_object(values, f"{name}, row {index}"))


def _parse_json(text: str, name: str, line: int = 1) -> Any:
    """line: the number of the text's first."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, problem = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    raise DataError(f"{name}, line {line}: malformed JSON: {problem}")


def _as_object(values: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{place}: expected an object with columns, got {type_name(values)}")
    return values


def _read_csv(path: Path, name: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(_read_text(path, name), newline=""), strict=True)
    header: list[str] | None = None
    place = f"{name}, line 1"
    try:
        for fields in reader:
            place = f"{name}, line {reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = fields
                repeated = [column for column in header if header.count(column) > 1]
                if repeated:
                    raise DataError(f"{place}: column {repeated[0]!r} appears twice")
            elif len(fields) != len(header):
                raise DataError(f"{place}: expected {len(header)} columns, got {len(fields)}")
            else:
                yield _Row(place, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        problem = f"{name}, line {reader.line_num}: malformed CSV: {error}"
        raise DataError(problem) from error


def _read_parquet(path: Path, name: str) -> Iterator[_Row]:
    parquet = import_for("reading Parquet files", "pyarrow.parquet", "alignpro[parquet]")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{name}: no readable Parquet file: {_first_line(error)}") from error
    for index, values in enumerate(rows):
        yield _Row(f"{name}, row {index}", values)


def _read_hub(name: str, split: str) -> Iterator[_Row]:
    datasets = import_for(f"reading the hub data set {name!r}", "datasets", "datasets")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # its errors share no base
        problem = f"hub data set {name!r}, split {split!r}: {_first_line(error)}"
        raise DataError(problem) from error
    for index, values in enumerate(rows):
        place = f"hub data set {name!r}, row {index}"
        yield _Row(place, _as_object(values, place))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
