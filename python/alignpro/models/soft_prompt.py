"""Soft prompts: trained rows that stand among the embedded tokens (Lester et al. 2021, arXiv
2104.08691), on disk as PEFT's PROMPT_TUNING, and as the ids that the engine knows them by.

In a sequence of tokens the id -1 - r is row r of the sequence's adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from alignpro.models.adapter_files import (
    CONFIG,
    TENSORS,
    Matrix,
    base_of_folder,
    check_unset,
    read_config,
    read_tensors,
)
from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Chat, not_unicode

if TYPE_CHECKING:
    from alignpro.native import core

Place = Literal["start", "instruction"]
PEFT_TYPE = "PROMPT_TUNING"
_TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class SoftRows:
    """How many rows a soft prompt has, and where they stand.

    ``start``: before everything, the beginning-of-sequence token included, as PEFT has it.
    ``instruction``: at the end of the last user turn, behind ``separator``, where an instruction
    stands that is appended to a prompt.

    Raises:
        ValueError: another place, or a separator that is no text.
    """

    count: int
    place: Place = "start"
    separator: str = ""

    def __post_init__(self) -> None:
        if self.place not in get_args(Place):
            expected = " or ".join(get_args(Place))
            raise ValueError(f"place: expected {expected}, got {self.place!r}")
        if not isinstance(self.separator, str):
            raise ValueError(f"separator: expected text, got {self.separator!r}")
        wrong = not_unicode(self.separator)
        if wrong is not None:
            raise ValueError(f"separator: {wrong}")

    @property
    def ids(self) -> list[int]:
        return [-1 - row for row in range(self.count)]


@dataclass(eq=False)
class SoftPrompt:
    """m rows among the embedded tokens.

    Compared by identity, and not to be edited once a model has seen it: the engine keeps its copy.

    Raises:
        ValueError: as `SoftRows`.
    """

    rows: Matrix  # [m, hidden]
    place: Place = "start"
    separator: str = ""  # what stands before them; with place instruction
    base_model_name: str = ""
    base_fingerprint: str = ""  # as of `LoraWeights`

    def __post_init__(self) -> None:
        _ = self.placed

    @property
    def placed(self) -> SoftRows:
        separator = "" if self.place == "start" else self.separator
        return SoftRows(len(self.rows), self.place, separator)


def chat_tokens(
    tokenizer: Tokenizer, messages: Chat, rows: SoftRows | None = None, most: int | None = None
) -> list[int]:
    """`Tokenizer.encode_chat`, with the rows at their place. Raises as that, and ValueError where
    the chat has no turn of the user for them."""
    if rows is None:
        return tokenizer.encode_chat(messages, most=most)
    if rows.place == "start":
        return [*rows.ids, *tokenizer.encode_chat(messages, most=most)]
    before, behind = tokenizer.encode_around(messages, rows.separator, most)
    return [*before, *rows.ids, *behind]


# The engine knows rows, and not where they stand.
_PLACED: weakref.WeakKeyDictionary[core.Adapter, SoftRows] = weakref.WeakKeyDictionary()


def remember_place(made: core.Adapter, rows: SoftRows) -> None:
    """Of the engine's copy of a soft prompt, for `placed_of`."""
    _PLACED[made] = rows


def placed_of(made: core.Adapter) -> SoftRows | None:
    """Where the rows of the engine's copy stand; None where it has none."""
    return _PLACED.get(made)


# --- on disk ---

# Options that say how the rows came to be, or what PEFT finds out about the model by itself.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "num_attention_heads"),
        *("num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type"),
        *("peft_version", "place", "prompt_tuning_init", "prompt_tuning_init_text", "revision"),
        *("separator", "task_type", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"),
    }
)


def read_soft_prompt(folder: Path, config: Mapping[str, Any]) -> SoftPrompt:
    """What `soft_prompt_files`, or PEFT, wrote. Raises ValueError, which names the file."""
    placed, path = _placed(folder / CONFIG, config), folder / TENSORS
    tensors = read_tensors(path)
    if set(tensors) != {_TENSOR}:
        raise ValueError(f"{path}: expected {_TENSOR} alone, got {', '.join(tensors) or 'nothing'}")
    rows = tensors[_TENSOR]
    width = config.get("token_dim")
    expected = (placed.count, *(rows.shape[1:2] or ["hidden"] if width is None else [width]))
    if rows.shape != expected:
        raise ValueError(f"{path}: {_TENSOR}: expected shape {expected}, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{path}: {_TENSOR}: holds NaN or infinity")
    return SoftPrompt(
        rows=rows,
        place=placed.place,
        separator=placed.separator,
        base_model_name=config.get("base_model_name_or_path") or "",
        base_fingerprint=base_of_folder(folder)[0],
    )


def placed_in(folder: Path) -> SoftRows | None:
    """Where the rows stand of an adapter in a folder; None where it has none, or is not there."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    config = read_config(path)
    return _placed(path, config) if config.get("peft_type") == PEFT_TYPE else None


def _placed(path: Path, config: Mapping[str, Any]) -> SoftRows:
    check_unset(path, config, _HARMLESS)
    count, place = config.get("num_virtual_tokens"), config.get("place", SoftRows.place)
    separator = config.get("separator", SoftRows.separator)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{path}: num_virtual_tokens: expected 1 or more, got {count!r}")
    if config.get("num_transformer_submodules") not in (None, 1):
        got = config["num_transformer_submodules"]
        raise ValueError(f"{path}: num_transformer_submodules: expected 1, got {got!r}")
    try:
        return SoftRows(count, place, separator)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def soft_prompt_files(weights: SoftPrompt) -> tuple[dict[str, Any], dict[str, Matrix]]:
    """(adapter_config.json, tensors). PEFT knows one place, ``start``; another is named by keys
    that PEFT warns of and leaves out."""
    rows = weights.rows
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"soft prompt: expected rows [m, hidden], got {rows.shape}")
    config: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": weights.base_model_name,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    if weights.place != SoftRows.place:
        config |= {"place": weights.place, "separator": weights.separator}
    return config, {_TENSOR: rows}
