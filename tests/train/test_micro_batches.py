"""The planner of micro-batches: everything covered, nothing over the limit, no more than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.train.micro_batches import MicroBatch, plan_micro_batches

FIXED, KEPT, RECOMPUTED = 7, 10, 3  # bytes: whatever the batch, and a row


def rows(sequences):
    return len({tuple(s[:i]) for s in sequences for i in range(1, len(s) + 1)})


def bytes_of(sequences, starts, activations):
    assert len(sequences) == len(starts) > 0
    return FIXED + rows(sequences) * {"keep": KEPT, "recompute": RECOMPUTED}[activations]


def plan(sequences, limit, **options):
    starts = [1] * len(sequences)
    return plan_micro_batches(sequences, starts, limit=limit, bytes_of=bytes_of, **options)


def need(part, activations="keep"):
    return bytes_of(part, [1] * len(part), activations)


def cost(batches, sequences):
    passes = {"keep": 3, "recompute": 4}
    return sum(passes[b.activations] * rows(b.of(sequences)) for b in batches)


def every_plan(sequences, limit, modes, most, begin=0):
    """All that are allowed."""
    if begin == len(sequences):
        yield []
    for end in range(begin + 1, min(len(sequences), begin + most) + 1):
        for mode in modes:
            if need(sequences[begin:end], mode) <= limit:
                for rest in every_plan(sequences, limit, modes, most, end):
                    yield [MicroBatch(begin, end, mode), *rest]


def alone(lengths):
    """Sequences that share nothing."""
    return [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]


def group(prompt, rewrites, first=0):
    """One prompt with rewrites of these lengths."""
    shared = [first + 1000 + i for i in range(prompt)]
    return [[*shared, *(100 * i + j for j in range(n))] for i, n in enumerate(rewrites)]


BATCHES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)


@given(
    BATCHES, st.integers(70, 200), st.sampled_from(["auto", "keep", "recompute"]),
    st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_the_cheapest_of_all_plans_and_then_the_shortest(sequences, limit, activations, most):
    sequences = sorted(sequences)  # what shares a beginning lies together
    batches = plan(sequences, limit, activations=activations, most=most)
    modes = ("keep", "recompute") if activations == "auto" else (activations,)
    allowed = list(every_plan(sequences, limit, modes, most or 100))
    assert batches in allowed
    assert (cost(batches, sequences), len(batches)) == min(
        (cost(other, sequences), len(other)) for other in allowed
    )


def test_what_fits_is_one_micro_batch_and_asked_once():
    asked = []

    def counted(sequences, starts, activations):
        asked.append(activations)
        return bytes_of(sequences, starts, activations)

    sequences = alone([5] * 8)
    batches = plan_micro_batches(sequences, [1] * 8, limit=need(sequences), bytes_of=counted)
    assert batches == [MicroBatch(0, 8, "keep")]
    assert asked == ["keep"]


def test_one_byte_less_is_two_micro_batches():
    sequences = alone([5] * 8)
    first, second = plan(sequences, need(sequences) - 1)
    assert first.begin == 0 and first.end == second.begin and second.end == 8


def test_smaller_micro_batches_are_preferred_to_recomputing():
    sequences = alone([5] * 8)
    limit = need(sequences[:2])  # recomputing, all 8 fit into two
    assert plan(sequences, limit) == [MicroBatch(i, i + 2, "keep") for i in (0, 2, 4, 6)]


def test_groups_are_not_cut():
    sequences = [*group(10, [3, 3]), *group(10, [3, 3], first=500), *group(10, [3, 3], first=900)]
    limit = need(sequences[:3])
    assert plan(sequences, limit) == [MicroBatch(i, i + 2, "keep") for i in (0, 2, 4)]


def test_a_long_shared_prompt_is_recomputed_rather_than_repeated():
    # Kept: 4 x 103 rows in three passes. Recomputed: 112 rows in four.
    sequences = group(100, [3, 3, 3, 3])
    assert plan(sequences, need(sequences[:1])) == [MicroBatch(0, 4, "recompute")]
    forced = plan(sequences, need(sequences[:1]), activations="keep")
    assert forced == [MicroBatch(i, i + 1, "keep") for i in range(4)]


def test_a_sequence_that_does_not_fit_otherwise_is_recomputed():
    sequences = alone([5, 5, 30, 5, 5])
    limit = need(sequences[:2])
    assert need(sequences[2:3]) > limit >= need(sequences[2:3], "recompute")
    assert plan(sequences, limit) == [
        MicroBatch(0, 2, "keep"),
        MicroBatch(2, 3, "recompute"),
        MicroBatch(3, 5, "keep"),
    ]


def test_a_sequence_that_fits_in_no_way_is_named():
    sequences = alone([5, 5, 30, 5])
    alone_, limit = need(sequences[2:3], "recompute"), need(sequences[:2], "recompute")
    message = (
        rf"^sequence 2: scoring its 30 tokens alone takes {alone_} bytes, memory_limit is {limit}; "
    )
    for activations in ("auto", "recompute"):
        with pytest.raises(ValueError, match=message + "raise memory_limit$"):
            plan(sequences, limit, activations=activations)
    with pytest.raises(ValueError, match=r"sequence 2: .*; set activations=auto or raise"):
        plan(sequences, need(sequences[:2]), activations="keep")


def test_no_more_than_so_many():
    sequences = alone([5] * 8)
    batches = plan(sequences, 10**9, most=3)
    assert [(b.begin, b.end) for b in batches] == [(0, 3), (3, 6), (6, 8)]


def test_nothing_to_plan():
    assert plan([], 1) == []


def test_its_part_of_aligned_lists():
    assert MicroBatch(1, 3, "keep").of("abcd") == "bc"
