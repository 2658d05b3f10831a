"""CHAIR by hand, and the scenes that ship."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from alignpro.data.load import load_prompts
from alignpro.rewards import build_reward
from alignpro.rewards.check import check_columns
from alignpro.rewards.scenes import (
    SceneCounts,
    chair,
    mentioned_objects,
    scene_counts,
    scene_objects,
)

ROWS = load_prompts("scenes")
TEXT = (
    "Two puppies and a Dog's bone lie by the park bench. A hot-dog stand, a couch and kids; "
    "the boy eats an apple. Scattered cats? Doghouse, tabletops."
)


def test_mentions_by_hand():
    assert mentioned_objects(TEXT) == [
        *("dog", "dog", "bench", "sofa", "child", "child", "apple", "cat", "table"),
    ]


def test_counts_and_chair_by_hand():
    counts = scene_counts(TEXT, ["dog", "child", "cat", "tree"])
    assert counts == SceneCounts(mentions=9, hallucinated=4, true_objects=3)
    nothing = scene_counts("A quiet place.", ["dog"])
    assert nothing == SceneCounts(0, 0, 0)
    true = scene_counts("A dog.", ["dog"])
    found = chair([counts, nothing, true])
    assert found == (pytest.approx(4 / 10), pytest.approx(1 / 3), pytest.approx(4 / 3))
    assert all(map(math.isnan, chair([])))
    assert math.isnan(chair([nothing]).per_mention) and chair([nothing]).per_description == 0


def test_the_reward_is_not_won_by_silence():
    reward = build_reward("chair")
    responses = [TEXT, "A quiet place.", "A dog.", "A cat."]
    objects = [["dog", "child", "cat", "tree"], ["dog"], ["dog"], ["dog"]]
    assert reward([""] * 4, [""] * 4, responses, objects=objects) == [5 / 9, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"needs the data column 'objects'; columns here: x$"):
        reward.check_columns({"x": []})
    check_columns(reward, {"objects": [["dog"]]})
    with pytest.raises(ValueError, match=r"row 1: expected objects of scenes, got 'unicorn'"):
        check_columns(reward, {"objects": [["dog"], ["unicorn"]]})
    with pytest.raises(ValueError, match="expected a list of texts, got 'dog'"):
        reward([""], [""], [""], objects=["dog"])


def test_eighty_objects_and_no_name_of_two():
    assert len(scene_objects()) == 80
    for name in scene_objects():
        assert mentioned_objects(f"a {name}.") == [name]


def test_the_scenes_that_ship():
    assert Counter(row.columns["split"] for row in ROWS) == {"train": 96, "heldout": 64}
    assert len({frozenset(row.columns["objects"]) for row in ROWS}) == len(ROWS)
    used = Counter(name for row in ROWS for name in row.columns["objects"])
    assert set(used) == set(scene_objects()) and max(used.values()) - min(used.values()) <= 1
    for row in ROWS:
        source, objects = row.columns["source"], row.columns["objects"]
        assert row.prompt == f"{source}\n\nDescribe the scene."
        assert mentioned_objects(source) == objects and 3 <= len(objects) <= 5
