"""Prompts that the project ships, and reading anyone's."""

from __future__ import annotations

from alignpro.data.files import DataError as DataError
from alignpro.data.load import PairRow as PairRow
from alignpro.data.load import PromptRow as PromptRow
from alignpro.data.load import load_instructions as load_instructions
from alignpro.data.load import load_pairs as load_pairs
from alignpro.data.load import load_prompts as load_prompts
from alignpro.data.load import stack_columns as stack_columns
