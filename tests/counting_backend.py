"""A tokenizer's backend that says how much it was given."""

from __future__ import annotations

from typing import Any


class CountingBackend:
    def __init__(self, backend: Any) -> None:
        self.backend, self.characters = backend, 0

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.backend.encode(text, **options)
