"""The made-up texts with records: what their script makes, no leak, and what makes them hard."""

from __future__ import annotations

from importlib.resources import files

import pytest

from alignpro.config import DataConfig
from alignpro.data.load import load_prompts
from data.make_records import FILES, lines_of

COUNTS = {"reactions": (200, 100), "recipes": (60, 30), "meetings": (60, 30)}


@pytest.mark.parametrize("name", FILES)
def test_the_packaged_file_is_what_the_script_makes(name):
    packaged = (files("alignpro") / "data" / name).read_text("utf-8")
    assert packaged == lines_of(name)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_no_text_twice(name):
    texts = []
    for split, count in zip(("train", "heldout"), COUNTS[name], strict=True):
        rows = load_prompts(DataConfig(name, split=split, prompt="text"))
        assert len(rows) == count
        texts += [row.prompt for row in rows]
    assert len(set(texts)) == len(texts)


def test_no_held_out_reaction_is_trained_on():
    kinds = {
        split: {
            (row.columns["flat"]["starting_material"], row.columns["flat"]["product"])
            for row in load_prompts(DataConfig("reactions", split=split, prompt="text"))
        }
        for split in ("train", "heldout")
    }
    assert len(kinds["train"]) == 31 and len(kinds["heldout"]) == 10
    assert not {n for pair in kinds["train"] for n in pair} & {
        n for pair in kinds["heldout"] for n in pair
    }


def test_a_share_of_the_texts_has_wrong_numbers_and_missing_values():
    rows = load_prompts(DataConfig("reactions", split=None, prompt="text"))
    tempting = [
        row for row in rows if any(w in row.prompt for w in ("attempt", "fell to", "literature"))
    ]
    assert 0.15 < len(tempting) / len(rows) < 0.4
    silent = [row for row in rows if "temperature" not in row.columns["record"]]
    assert 0.04 < len(silent) / len(rows) < 0.2
