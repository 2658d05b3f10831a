"""How a batch is cut into micro-batches, so that scoring each of them fits in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from alignpro.config import FitConfig

# What a score keeps for its backward: every layer's activations, or only the stream between the
# layers, which are then run again, to the same bits.
Activations = Literal["keep", "recompute"]
Tokens = Sequence[int]
BytesOf = Callable[[Sequence[Tokens], Sequence[int], Activations], int]
Item = TypeVar("Item")

# Passes over the layers, a row: policy, reference, backward; and the policy again.
_PASSES = {"keep": 3, "recompute": 4}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences [begin, end) of a batch, scored together."""

    begin: int
    end: int
    activations: Activations

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its part of something that has one item a sequence."""
        return items[self.begin : self.end]


def fit_micro_batches(
    sequences: Sequence[Tokens],
    starts: Sequence[int],
    config: FitConfig,
    bytes_of: BytesOf,
    *,
    together: int = 1,
) -> list[MicroBatch]:
    """`plan_micro_batches` as a configuration says; its ``micro_batch_size`` counts groups."""
    most = config.micro_batch_size
    return plan_micro_batches(
        sequences,
        starts,
        limit=config.memory_limit,
        bytes_of=bytes_of,
        activations=config.activations,
        most=None if most is None else most * together,
        together=together,
    )


def plan_micro_batches(
    sequences: Sequence[Tokens],
    starts: Sequence[int],
    *,
    limit: int,
    bytes_of: BytesOf,
    activations: Literal["auto", "keep", "recompute"] = "auto",
    most: int | None = None,
    together: int = 1,
) -> list[MicroBatch]:
    """Consecutive micro-batches that fit ``limit``, for the least arithmetic; then, the fewest.

    Arithmetic is counted in rows (tokens; those of a beginning shared with the sequence before,
    once a micro-batch) times passes over the layers. So a batch that fits is one micro-batch, and
    one that does not is cut where neighbours share little, between the groups of a prompt.
    Recomputing, with its one pass more, is left to sequences that do not fit otherwise, and to long
    prompts that a cut would repeat.

    Args:
        sequences, starts: as for `Policy.score`.
        limit: bytes that the score of one micro-batch may hold.
        bytes_of: (sequences, starts, activations) -> bytes; more sequences never take less.
        activations: "auto" chooses for each micro-batch.
        most: sequences in one micro-batch; None: any number.
        together: neighbours, from the first on, that no cut may part: 2 for pairs.
    """
    count = len(sequences)
    modes: tuple[Activations, ...] = (
        ("keep", "recompute") if activations == "auto" else (activations,)
    )

    def need(begin: int, end: int, mode: Activations) -> int:
        return bytes_of(sequences[begin:end], starts[begin:end], mode)

    if not count:
        return []
    if (most is None or count <= most) and need(0, count, modes[0]) <= limit:
        return [MicroBatch(0, count, modes[0])]

    reach = {mode: _reach(count, most or count, limit, mode, need) for mode in modes}
    begins = range(0, count, together)
    for index in begins:
        if all(reach[mode][index] < index + together for mode in modes):
            tokens = sum(map(len, sequences[index : index + together]))
            raise ValueError(
                f"sequence {index}: scoring its {tokens} tokens alone takes "
                f"{need(index, index + together, modes[-1])} bytes, memory_limit is {limit}; "
                + ("set activations=auto or " if activations == "keep" else "")
                + "raise memory_limit"
            )
    rows = [len(s) for s in sequences]
    shared = [0, *(shared_prefix(a, b) for a, b in itertools.pairwise(sequences))]
    # From each position to the end: (cost, micro-batches), and the first of them.
    best, first = [(0, 0)] * (count + 1), [MicroBatch(0, 0, "keep")] * count
    for begin in reversed(begins):
        options = []
        for mode in modes:
            size = shared[begin]
            for end in range(begin + together, reach[mode][begin] + 1, together):
                size += sum(rows[i] - shared[i] for i in range(end - together, end))
                cost, batches = best[end]
                options.append((cost + _PASSES[mode] * size, batches + 1, -end, mode))
        cost, batches, end, mode = min(options)
        best[begin], first[begin] = (cost, batches), MicroBatch(begin, -end, mode)
    plan = [first[0]]
    while plan[-1].end < count:
        plan.append(first[plan[-1].end])
    return plan


def _reach(
    count: int, most: int, limit: int, mode: Activations, need: Callable[..., int]
) -> list[int]:
    """For each position, the end of the largest micro-batch there; itself where nothing fits."""
    ends, end = [], 0
    for begin in range(count):
        end = max(end, begin)  # what fits from one position on, fits from the next
        while end < min(count, begin + most) and need(begin, end + 1, mode) <= limit:
            end += 1
        ends.append(end)
    return ends


def shared_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
