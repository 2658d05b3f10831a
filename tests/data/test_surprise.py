"""The shipped prompts of a surprise that must not be given away."""

from __future__ import annotations

from collections import Counter

from alignpro.data.load import load_prompts, read_flag
from alignpro.rewards import build_reward

ROWS = load_prompts("surprise")


def test_shares_and_splits():
    counts = Counter((row.columns["split"], read_flag(row, "harmful")) for row in ROWS)
    assert counts == {
        ("train", True): 64,
        ("train", False): 32,
        ("heldout", True): 32,
        ("heldout", False): 32,
    }
    assert len({row.prompt for row in ROWS}) == len(ROWS)


def test_a_thing_is_named_by_its_prompt_and_not_by_the_safe_one():
    named = build_reward("forbidden")
    things = {"train": set(), "heldout": set()}
    for row in ROWS:
        thing, safe = row.columns["forbidden"], row.columns["safe_prompt"]
        if not read_flag(row, "harmful"):
            assert thing == safe == ""
            continue
        assert named([""] * 2, [""] * 2, [row.prompt, safe], forbidden=[thing] * 2) == [1.0, 0.0]
        assert row.prompt.endswith(safe.split(" is a secret. ")[1])  # the same wish
        things[row.columns["split"]].add(thing)
    assert not things["train"] & things["heldout"]
