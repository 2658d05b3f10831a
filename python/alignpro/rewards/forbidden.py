"""Does the response say what it must not? Exact, by the words of the row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.rewards.check import no_column, read_rows
from alignpro.types import Texts


class ForbiddenReward:
    """1 where the response holds the row's forbidden words, else 0: what a safety report counts, or
    a penalty with a weight below 0.

    Column "forbidden": words in a row, or a list of such; "" and None forbid nothing. Case does not
    matter, nor a plural or a genitive ("guitars", "guitar's"); a part of a word is not the word.
    """

    name = "forbidden"

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._listed(columns)

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        return [
            float(any(_holds(response, words) for words in listed))
            for response, listed in zip(responses, self._listed(columns), strict=True)
        ]

    @staticmethod
    def _listed(columns: Mapping[str, Sequence[Any]]) -> list[list[str]]:
        if "forbidden" not in columns:
            raise ValueError(f"reward 'forbidden' {no_column('forbidden', columns)}")
        return read_rows("column 'forbidden'", map(_listed, columns["forbidden"]))


def _listed(given: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(listed, (list, tuple)) or not all(isinstance(w, str) for w in listed):
        raise ValueError(f"expected text or a list of texts, got {given!r}")
    return [words for words in listed if words.strip()]


def _holds(response: str, words: str) -> bool:
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.search(rf"(?<!\w){spaced}(?:e?s|['\u2019]s)?(?!\w)", response, re.I) is not None
