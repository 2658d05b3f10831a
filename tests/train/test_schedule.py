"""What a step reads, and its learning rate."""

from __future__ import annotations

import pytest

from alignpro.config import SftConfig
from alignpro.train.schedule import batch_indices, rate_factor


def test_every_pass_is_a_permutation_of_its_own():
    drawn = batch_indices(seed=3, cursor=0, count=30, rows=10)
    passes = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(10))
    assert batch_indices(seed=4, cursor=0, count=10, rows=10) != passes[0]


def test_batches_are_windows_of_one_stream():
    whole = batch_indices(seed=3, cursor=0, count=24, rows=7)
    pieces = [batch_indices(seed=3, cursor=c, count=8, rows=7) for c in (0, 8, 16)]
    assert [i for piece in pieces for i in piece] == whole


def test_a_batch_larger_than_the_data():
    assert sorted(batch_indices(seed=0, cursor=0, count=4, rows=2)) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="no rows"):
        batch_indices(seed=0, cursor=0, count=4, rows=0)


def test_learning_rate_by_hand():
    def factors(schedule):
        return [
            rate_factor(SftConfig(steps=6, warmup_steps=2, lr_schedule=schedule), s)
            for s in range(6)
        ]

    assert factors("constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert factors("linear") == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert rate_factor(SftConfig(steps=1, warmup_steps=0, lr_schedule="linear"), 0) == 1.0
