"""llama.cpp's own vocabularies and texts, in the folder that ALIGNPRO_VOCABULARIES names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_vocabulary(name: str) -> Path:
    """A file or folder there. The test that asks for one that is not there is skipped."""
    root = os.environ.get("ALIGNPRO_VOCABULARIES")
    if root is None or not (Path(root) / name).exists():
        pytest.skip(f"ALIGNPRO_VOCABULARIES names no folder with {name}")
    return Path(root) / name


def texts_and_ids(name: str) -> list[tuple[str, list[int]]]:
    """Texts, and what llama.cpp makes of them by the vocabulary of this name."""
    file = real_vocabulary(f"vocab/ggml-vocab-{name}.gguf.inp")
    with file.open(newline="", encoding="utf-8") as texts:
        inputs = texts.read().split("\n__ggml_vocab_test__\n")
    outputs = file.with_suffix(".out").read_text("utf-8").splitlines()
    assert len(outputs) > 40
    pairs = zip(inputs, outputs, strict=False)
    return [(text, [int(i) for i in line.split()]) for text, line in pairs]
