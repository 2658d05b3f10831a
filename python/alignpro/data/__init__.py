"""Prompts that the project ships, and reading anyone's."""

from __future__ import annotations

from alignpro.data.load import (
    DataError,
    PairRow,
    PromptRow,
    load_pairs,
    load_prompts,
    stack_columns,
)

__all__ = ["DataError", "PairRow", "PromptRow", "load_pairs", "load_prompts", "stack_columns"]
