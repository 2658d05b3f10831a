"""Of a text that is surely too long a beginning is encoded, which says so as the whole does."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest

from alignpro.models.native_model import NativeModel
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import core
from counting_backend import CountingBackend
from models.test_tokenizer import CORPUS, FLAVOURS, PLAIN, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.of(core.ModelFiles(str(smollm2_path)))


@pytest.mark.parametrize("text", ["a", "word ", "é", " ", "<|im_end|>", "<file_sep>"])
def test_of_a_long_text_a_beginning_is_encoded(tokenizer: Tokenizer, text: str) -> None:
    long, counting = text * 200_000, CountingBackend(tokenizer.backend)
    counted = replace(tokenizer, backend=counting, continuation=counting)
    chat = [{"role": "user", "content": long}]
    around = counted.encode_around(chat, "\n", 100)[0]
    for ids in (counted.encode(long, most=100), counted.encode_chat(chat, most=100), around):
        assert 200 < len(ids) < len(long) / 10
    assert 0 < counting.characters < 150_000  # of 3 times 200,000 and more
    with pytest.raises(ValueError, match="lone surrogate"):  # wherever it stands
        counted.encode(long + "\ud800", most=100)


def test_a_prompt_far_over_the_context_is_refused_by_its_beginning(smollm2: NativeModel) -> None:
    counting = CountingBackend(smollm2.tokenizer.backend)
    counted = replace(smollm2.tokenizer, backend=counting, continuation=counting)
    model = copy.copy(smollm2)
    model.tokenizer = counted
    limit = model.context_length
    for ask in (lambda text: model.generate([text]), model.stream):
        with pytest.raises(ValueError, match=f"context of {limit}, got more than {2 * limit} tok"):
            ask("why " * 2_000_000)
    assert 0 < counting.characters < 2_000_000  # of 16 million


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_of_interest_of_a_text_is_as_in_the_whole(tmp_path: Path, flavour: str) -> None:
    save_tokenizer(tmp_path, flavour)
    tokenizer, source = Tokenizer.from_folder(tmp_path), random.Random(1)
    words = [*CORPUS.split(), *PLAIN[8:13], " ", "\n\n", "a" * 40, "<tool_call>", " " * 30]
    for _ in range(300):
        text = " ".join(source.choices(words, k=source.randint(1, 60)))
        whole, most = tokenizer.encode(text), source.randint(1, 60)
        ids = tokenizer.encode(text, most=most)
        assert ids == whole if len(whole) <= 2 * most else len(ids) > 2 * most, (text, most)
