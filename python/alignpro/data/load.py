"""Reading prompts, pairs and instructions from files, the package's own data, or the hub.

A source is a path, or a group of the configuration with its columns (`config.data`):
* a file as `data.files` reads them;
* the name of data that the package ships: "everyday", "house_rules", "surprise" and "scenes"
  (prompts), "instructions" and "house_rules_warm_start" (pairs), "warm_tones" (preferences),
  "reactions", "recipes" and "meetings" (texts with records);
* the name of a data set on the hub, "owner/name" or "owner/name:subset", read through the package
  ``datasets``.

Errors are DataError, one line that names the source, the line or row, and the column.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from alignpro.config import DataConfig, InstructionsConfig, PairsConfig, Source
from alignpro.data.files import (
    SUFFIXES,
    DataError,
    NoColumnError,
    Row,
    read_file,
    suffix_of,
)
from alignpro.data.messages import chat_in_text, is_cut_chat, list_in_text, openai_form
from alignpro.optional import import_for
from alignpro.types import Conversation, Message, Prompt, not_unicode, text_messages, type_name

PACKAGED = {
    "everyday": "everyday_prompts.jsonl",
    "instructions": "instructions.jsonl",
    "house_rules": "house_rules.jsonl",
    "house_rules_warm_start": "house_rules_warm_start.jsonl",
    "surprise": "surprise.jsonl",
    "warm_tones": "warm_tones.jsonl",
    "reactions": "reactions.jsonl",
    "recipes": "recipes.jsonl",
    "meetings": "meetings.jsonl",
    "scenes": "scenes.jsonl",
}
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "turns")
_SYSTEM = {"system", "developer"}
# What Alpaca, Dolly and BPO put beside a user's instruction: it belongs to the prompt.
_BESIDE_INSTRUCTION = ("input", "context")
# What LLaMA-Factory's and TRL's data hold beside a prompt: models would answer another one.
_UNREAD = ("history", "images", "videos", "audios", "tools")


class DataRow(Protocol):
    """What rows of prompts and of pairs have in common."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def place(self) -> str: ...


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the other columns of its row, which rewards may use."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)  # in the user's data: "prompts.csv, line 3"
    is_chat: bool = field(default=False, compare=False)  # its prompt was given as messages


def load_prompts(
    source: str | Path | DataConfig,
    column: str | Sequence[str] | None = None,
    split: str | None = None,
) -> list[PromptRow]:
    """Rows of ``source`` with their prompt, in the order of the source.

    A prompt is text, or a conversation that ends in a user turn: a list of
    ``{"role": "system" | "user" | "assistant", "content": text}``, or ShareGPT's
    ``{"from": "human" | "gpt" | "system", "value": text}``, whose system message may be a column
    "system" beside it. Content may be parts of type "text". An
    answer after the last user turn is no part of the prompt; where it is one message, it is the
    column "reference" of rows that have none. A column "turns" holds the user's turns alone
    (MT-Bench): the later ones refer to answers that nobody has given, so the first is the prompt,
    and the column stays among the others for the reward.

    source: a group says the rest as well; the other arguments are for a path alone.
    column, split: see `DataConfig.prompt` and `Source.split`; None: every row.

    Raises DataError for a source that is not there, is malformed, or has no rows left; for a row
    without the column; for a prompt that is empty, has the wrong type or a lone surrogate; for
    messages with another role or what is no text (images, tool calls); for a column "instruction"
    alone beside an "input" or "context" that belongs to it.
    """
    if not isinstance(source, (str, Path, DataConfig)):
        raise DataError(
            f"source: expected a path or a DataConfig, got {type_name(source)}; rows in memory are "
            "written to a file (to_parquet of a Dataset), or given to a Trainer as prompts"
        )
    if not isinstance(source, DataConfig):
        source = DataConfig(str(source), split=split, prompt=_as_columns(column))
    prompts = []
    for row in read_rows(source):
        names, prompt, reply, is_chat = prompt_of(row, source)
        others = {key: value for key, value in row.values.items() if key not in names}
        if "turns" in names:
            others["turns"] = list_in_text(row.values["turns"])
        if reply is not None:
            others.setdefault("reference", reply)
        prompts.append(PromptRow(prompt, others, row.place, is_chat))
    return prompts


def read_flag(row: DataRow, column: str) -> bool:
    """A column's true or false, as JSON or a table spells them; a row without it is false. Raises
    DataError, which names the row."""
    value = row.columns.get(column)
    text = str("" if value is None else value).strip().lower()
    if text in ("true", "yes", "1"):
        return True
    if text in ("", "false", "no", "0"):
        return False
    expected = f"expected true or false in column {column!r}"
    raise DataError(f"{row.place}: {expected}, got {value!r}")


@dataclass(frozen=True)
class PairRow:
    """A prompt, and what the prompter is to write for it: "" leaves the prompt as it is."""

    prompt: Prompt
    instruction: str
    place: str = field(default="", compare=False)


def load_pairs(
    source: str | Path | PairsConfig,
    prompt_column: str | Sequence[str] | None = None,
    instruction_column: str = "instruction",
    split: str | None = None,
) -> list[PairRow]:
    """Rows of ``source`` as pairs; sources, arguments and errors as in ``load_prompts``."""
    if not isinstance(source, PairsConfig):
        columns = _as_columns(prompt_column)
        source = PairsConfig(
            str(source), split=split, prompt=columns, instruction=instruction_column
        )
    return [
        PairRow(prompt_of(row, source)[1], text_of(row, source.instruction), row.place)
        for row in read_rows(source)
    ]


def pair_at_random(
    rows: Sequence[PromptRow], instructions: Sequence[str], per_prompt: int, seed: int
) -> list[PairRow]:
    """``per_prompt`` different instructions for every prompt, each used as often as another (to one
    use), drawn without a look at the prompt."""
    drawn, used = random.Random(seed), [0] * len(instructions)
    pairs = []
    for row in rows:
        order = drawn.sample(range(len(used)), len(used))
        for chosen in sorted(order, key=used.__getitem__)[:per_prompt]:
            used[chosen] += 1
            pairs.append(PairRow(row.prompt, instructions[chosen], row.place))
    return pairs


def load_instructions(source: str | Path | InstructionsConfig) -> list[str]:
    """The distinct texts of the column of instructions, in order; pairs that leave the prompt alone
    ("") have none. Sources and errors as in ``load_prompts``.

    Raises DataError where no column is named and "instruction" may hold what users asked, as in the
    files of Alpaca, Dolly and BPO: it stands beside other columns, and none of them is a prompt.
    """
    if not isinstance(source, InstructionsConfig):
        source = InstructionsConfig(str(source))
    texts = []
    for row in read_rows(source):
        others = sorted(row.values.keys() - {"instruction", "split"})
        if source.instruction is None and others and not row.values.keys() & set(PROMPT_COLUMNS):
            raise DataError(
                f"{row.place}: column 'instruction' is read as candidate instructions, and beside "
                f"{others} without a prompt it may hold what users asked; name the column that is "
                "meant: instructions: {path: ..., instruction: COLUMN}"
            )
        texts.append(text_of(row, source.instruction or "instruction").strip())
    return [text for text in dict.fromkeys(texts) if text]


def stack_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """The rows' other columns as lists aligned with ``rows``; None where a row lacks a column. Of
    data whose prompts are messages, "conversations" holds these of every row, for rewards.

    Raises DataError where such data have a column of that name.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    if any(row.is_chat for row in rows):
        if "conversations" in columns:
            where = next(row.place for row in rows if "conversations" in row.columns)
            raise DataError(
                f"{where}: column 'conversations' collides with a reward argument; rename it"
            )
        columns["conversations"] = [Conversation.of(row.prompt).messages for row in rows]
    return columns


def _as_columns(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return given if given is None or isinstance(given, str) else tuple(given)


def text_of(row: Row, column: str, key: str = "instruction") -> str:
    value, where = value_of(row, column, key), f"{row.place}, column {column!r}"
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {type_name(value)}")
    if value and not value.strip():
        raise DataError(f"{where}: expected text, got white space alone")
    check_unicode(value, where)
    return value


def value_of(row: Row, column: str, key: str) -> Any:
    """key: of the configuration, that names the column."""
    if column not in row.values:
        raise NoColumnError(
            f"{row.place}: no column {column!r}; there are {sorted(row.values)}", f"data.{key}"
        )
    return row.values[column]


def prompt_of(row: Row, source: DataConfig) -> tuple[tuple[str, ...], Prompt, str | None, bool]:
    """The prompt's columns, the prompt, the answer that stands after it, if one does, and whether
    it is given as messages."""
    column = source.prompt
    if isinstance(column, tuple):
        texts = [text_of(row, name, "prompt") for name in column]
        value: Any = "\n\n".join(text for text in texts if text)
        names, where = column, f"{row.place}, columns {', '.join(column)}"
    else:
        if column is None:
            column = next((n for n in PROMPT_COLUMNS if n in row.values), PROMPT_COLUMNS[0])
        value, where = value_of(row, column, "prompt"), f"{row.place}, column {column!r}"
        names = (column,)
    beside = [name for name in _BESIDE_INSTRUCTION if row.values.get(name)]
    if names == ("instruction",) and beside:
        raise DataError(
            f"{where}: {beside[0]!r} beside it is a part of the prompt; name both, as "
            f"data.prompt=[instruction, {beside[0]}], or take the column out of the data"
        )
    for name in _UNREAD:
        if name not in names and isinstance(row.values.get(name), list) and row.values[name]:
            raise DataError(
                f"{where}: {name!r} beside it is a part of the prompt that is not read; earlier "
                "turns belong into messages; otherwise leave the row or the column out of the data"
            )
    value = chat_in_text(value)
    try:
        if isinstance(value, str) and is_cut_chat(value):
            raise ValueError("expected messages as JSON, got the beginning of some, or malformed")
        if column == "turns":
            value = list_in_text(value)
        if column in PROMPT_COLUMNS[1:] and isinstance(value, str):
            raise ValueError("expected a list, got text; a prompt as text is in 'prompt'")
        if column == "turns":
            prompt, reply = Conversation.of(_first_turn(value)), None
        elif isinstance(value, str):
            prompt, reply = Conversation.of(value), None
        else:
            messages = text_messages(openai_form(value))
            system = row.values.get("system")
            if isinstance(system, str) and system and not _SYSTEM & {m["role"] for m in messages}:
                messages = [{"role": "system", "content": system}, *messages]
                names = (*names, "system")
            prompt, reply = _up_to_last_user_turn(messages)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    is_chat = column != "turns" and not isinstance(value, str)
    return names, as_read(prompt, source, where), reply, is_chat


def as_read(prompt: Conversation, source: DataConfig, where: str) -> Prompt:
    """The short form, its system messages by ``source.system``. DataError: a lone surrogate."""
    if source.system == "drop":
        others = [(role, text) for role, text in prompt.history if role not in _SYSTEM]
        prompt = Conversation(tuple(others), prompt.last_turn)
    for message in prompt.messages:
        check_unicode(message["content"], where)
    return prompt.short


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


def _first_turn(turns: Any) -> Any:
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(t, str) for t in turns):
        raise ValueError(f"expected a list of the user's turns as text, got {type_name(turns)}")
    return turns[0]


def check_unicode(value: str, where: str) -> None:
    wrong = not_unicode(value)
    if wrong is not None:
        raise DataError(f"{where}: {wrong}")


# Sources


def is_local(source: Source) -> bool:
    """Whether it is here: a file, or the package's own."""
    path = source.path or ""
    return path in PACKAGED or Path(path).exists() or not _on_hub(path)


def _on_hub(name: str) -> bool:
    path = Path(name)
    here = path.parent.is_dir() or name.startswith((".", "/", "~"))
    return name.count("/") == 1 and not here and suffix_of(name) not in SUFFIXES


def read_rows(source: Source) -> list[Row]:
    """All rows of a source, after the split was taken; never empty."""
    path, name = find_file(source), source.path
    assert name is not None
    if path is None:
        rows = list(_read_hub(source))
    else:
        rows = _take_split(read_file(path, name), source.split, name)
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def find_file(source: Source) -> Path | None:
    """The file of a source; None of a data set on the hub. Raises DataError where there is none."""
    name = source.path
    assert name is not None  # the configuration's rule, or `DataConfig.of`
    path = Path(name)
    if name in PACKAGED and not path.exists():
        path = Path(__file__).with_name(PACKAGED[name])
    if not path.is_file() and _on_hub(name):
        return None
    if (source.subset, source.revision) != (None, None):
        raise DataError(f"{name}: subset and revision are of a hub data set; this is none")
    if path.is_file():
        return path
    if path.exists() or "/" in name or suffix_of(name) in SUFFIXES:
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        problem = "is a folder" if path.exists() else f"there is no such file{here}"
        raise DataError(f"{name}: {problem}; expected a file ({', '.join(SUFFIXES)})")
    raise DataError(
        f"{name}: expected a file ({', '.join(SUFFIXES)}), one of the package's own "
        f"({', '.join(PACKAGED)}), or a hub data set 'owner/name'"
    )


def _take_split(rows: list[Row], split: str | None, name: str) -> list[Row]:
    if split is None:
        return rows
    without = [row for row in rows if "split" not in row.values]
    if without and len(without) < len(rows):
        raise DataError(f"{without[0].place}: no column 'split', which other rows have")
    if without:
        if split == "train":
            return rows
        raise DataError(
            f"{name}: no column 'split', so all its rows are training data, and none are of split "
            f"{split!r}; add the column, or set the split of the data to null to take every "
            "row: data.split=null"
        )
    for row in rows:
        given = row.values["split"]
        if given is None or not str(given).strip():
            raise DataError(
                f"{row.place}: nothing in column 'split', which says what a row is for; fill it "
                "in, or set the split of the data to null to take every row"
            )
        if given != split and str(given).strip().lower() == split.lower():
            raise DataError(f"{row.place}: split {given!r} beside {split!r}; write them alike")
    kept = [row for row in rows if row.values["split"] == split]
    if rows and not kept:
        there = sorted({str(row.values["split"]) for row in rows})
        raise DataError(f"{name}: no rows in split {split!r}; there are {there}")
    return kept


def _read_hub(source: Source) -> Iterator[Row]:
    assert source.path is not None
    name, _, subset = source.path.partition(":")
    if subset and source.subset is not None:
        raise DataError(f"{source.path}: the subset is named twice, {source.subset!r} beside it")
    named, split = subset or source.subset, source.split or "train"
    datasets = import_for(f"reading the hub data set {name!r}", "datasets", "datasets")
    options = {} if source.revision is None else {"revision": source.revision}
    try:
        rows = datasets.load_dataset(name, *([named] if named else []), split=split, **options)
    except Exception as error:  # its errors share no base
        # They list the subsets, or splits, that there are, and end in an example for Python.
        text = " ".join(str(error).partition("Example of usage")[0].split())
        said = text[:500] or type(error).__name__
        if named is None and "config" in said.lower():
            said += f"; name one as {name}:SUBSET, or as subset"
        raise DataError(f"hub data set {source.path!r}, split {split!r}: {said}") from error
    for index, values in enumerate(rows):
        place = f"hub data set {source.path!r}, row {index}"
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected columns, got {type_name(values)}")
        yield Row(place, values)
