"""What a step of training computes, counted from shapes and lengths.

A multiply-add is two operations. Norms, rotations and activations are left out: under a hundredth
of the matrices. Every rewrite and response is taken to run to its maximum; nothing is computed
twice that sequences share at their beginning, as in the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from alignpro.config import TrainConfig
from alignpro.native import core
from alignpro.price.lengths import Lengths, common
from alignpro.price.shapes import ModelShape, PricedModel
from alignpro.train.micro_batches import Activations, MicroBatch, plan_micro_batches
from alignpro.train.policy import select_modules

ENGINE_ROWS = 256  # tokens in one forward of the engine
_FLOAT = 4

Kind = Literal["generate", "score"]


@dataclass(frozen=True)
class Phase:
    """A part of a step."""

    name: str
    kind: Kind
    rows: int  # positions that pass through the layers
    flops: float
    # Read, each operand once a pass: weights, and with as few passes as the order of tokens allows.
    weight_bytes: float
    least_weight_bytes: float
    kv_elements: float = 0.0  # of keys and values that are read
    int8: bool = False  # in products of stored codes


@dataclass(frozen=True)
class Work:
    """One step."""

    phases: tuple[Phase, ...]
    tokens: dict[str, int]
    lora_parameters: int
    kv_elements: int  # of keys and values of all sequences of a step at their full length
    alone_kv_elements: int  # of one rewrite and one response
    score_bytes: int  # most that the score of a micro-batch holds
    micro_batches: int

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)


def count_step(
    config: TrainConfig, lengths: Lengths, prompter: PricedModel, target: PricedModel
) -> Work:
    """The work of one step.

    Raises:
        ValueError: a rewrite that does not fit ``memory_limit`` alone, a sequence over a context.
    """
    prompts, rewrites = config.prompts_per_step, config.prompts_per_step * config.num_rewrites
    responses = rewrites * config.num_responses
    wrote, answered = config.rewrite.max_new_tokens, config.response.max_new_tokens
    _check_context("prompter", prompter, lengths.prompter + wrote)
    _check_context("target", target, lengths.target + answered)
    lora = lora_parameters(prompter.shape, config)

    read = _Rows(prompter.shape, lora)
    read.add(0, lengths.prompter_shared)
    read.add(lengths.prompter_shared, lengths.prompter, prompts)
    # The last position is computed for every sample, which draws its first token there.
    read.add(lengths.prompter - 1, lengths.prompter, rewrites - prompts)
    write = _Rows(prompter.shape, lora)
    write.add(lengths.prompter, lengths.prompter + wrote - 1, rewrites)
    hear = _Rows(target.shape, 0)
    hear.add(0, lengths.target_shared)
    hear.add(lengths.target_shared, lengths.target_head, prompts)
    hear.add(lengths.target_head, lengths.target, rewrites)
    hear.add(lengths.target - 1, lengths.target, responses - rewrites)
    answer = _Rows(target.shape, 0)
    answer.add(lengths.target, lengths.target + answered - 1, responses)
    int8 = config.target_compute == "int8"
    writing, answering = rewrites * (wrote - 1), responses * (answered - 1)
    generate = (
        _generation("prompter reads", read, rewrites, -(-read.rows // ENGINE_ROWS), 1, prompter),
        _generation(
            "prompter writes",
            write,
            writing,
            -(-rewrites // ENGINE_ROWS) * (wrote - 1),
            wrote - 1,
            prompter,
            kv=_read_positions(prompts, config.num_rewrites, lengths.prompter, wrote),
        ),
        _generation(
            "target reads", hear, responses, -(-hear.rows // ENGINE_ROWS), 1, target, int8=int8
        ),
        _generation(
            "target writes",
            answer,
            answering,
            -(-responses // ENGINE_ROWS) * (answered - 1),
            answered - 1,
            target,
            kv=_read_positions(rewrites, config.num_responses, lengths.target, answered),
            int8=int8,
        ),
    )
    plan, begins, most = _plan(config, lengths, prompter.shape)
    score = tuple(_scoring(config, lengths, prompter, lora, plan, begins))
    forward = score[0].rows
    prompter_kv = (read.rows + write.rows) * prompter.shape.kv_elements
    target_kv = (hear.rows + answer.rows) * target.shape.kv_elements
    alone = (lengths.prompter + wrote) * prompter.shape.kv_elements
    alone += (lengths.target + answered) * target.shape.kv_elements
    return Work(
        phases=generate + score,
        tokens={
            "prompter reads": read.rows,
            "prompter writes": rewrites * wrote,
            "target reads": hear.rows,
            "target writes": responses * answered,
            "generated": rewrites * wrote + responses * answered,
            "scored forward": 2 * forward,
            "scored backward": forward,
        },
        lora_parameters=lora,
        kv_elements=prompter_kv + target_kv,
        alone_kv_elements=alone,
        score_bytes=most,
        micro_batches=len(plan),
    )


def lora_parameters(shape: ModelShape, config: TrainConfig) -> int:
    """Of the matrices that are trained."""
    modules = select_modules(shape.linears, config.lora.target_modules)
    return config.lora.rank * sum(rows + cols for rows, cols in modules.values())


def score_bytes(
    shape: ModelShape,
    lora_modules: int,
    rank: int,
    rows: int,
    values: int,
    activations: Activations,
    threads: int,
) -> int:
    """What `Score::bytes` (src/alignpro/model/scorer.cc) says of a request with so many rows and
    scored values, a reference and gradients. ``lora_modules``: in a layer."""
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    qkv = shape.q_size + 2 * shape.kv_size
    ranks = lora_modules * rank
    activation = qkv + shape.q_size + hidden + 2 * inner + ranks
    kept = layers if activations == "keep" else 1
    floats = (layers + 1) * hidden + kept * activation  # streams and activations
    floats += hidden + activation  # the reference's
    floats += hidden + inner + 2 * hidden + shape.head_dim  # scratch, normed, angles
    floats += 3 * inner + 4 * hidden + shape.q_size + qkv + shape.num_heads + ranks  # backward
    floats += 2 * shape.kv_size  # attention's backward
    floats += 2 * shape.kv_size  # one layer's keys and values
    return _FLOAT * (rows * floats + 5 * values * hidden) + _fixed_score_bytes(shape, threads)


def _fixed_score_bytes(shape: ModelShape, threads: int) -> int:
    """What does not grow with the rows: packed rows of a product, and a tile of the vocabulary
    with its statistics for each thread."""
    packed = 480 * (max(shape.q_size, 2 * shape.intermediate_size) + 16 * (threads + 1))
    tiles = -(-shape.vocab_size // 256)
    tile = 256 * 16 + (256 + 16) * shape.hidden_size
    rows = 96 * (7 * tiles + 4 * shape.hidden_size + 4 * 256)
    return _FLOAT * (packed + threads * (tile + rows))


class _Rows:
    """Positions that pass through a model's layers, and what attention and matrices make of it."""

    def __init__(self, shape: ModelShape, lora: int) -> None:
        self._shape, self._lora = shape, lora
        self.rows = 0
        self.pairs = 0.0

    def add(self, begin: int, end: int, sequences: int = 1) -> None:
        """Positions [begin, end) of each sequence, each of which sees those up to itself."""
        self.rows += sequences * (end - begin)
        self.pairs += sequences * (end * (end + 1) - begin * (begin + 1)) / 2

    @property
    def matrix_flops(self) -> float:
        return 2.0 * self.rows * self._shape.linear_parameters

    @property
    def lora_flops(self) -> float:
        return 2.0 * self.rows * self._lora

    @property
    def attention_flops(self) -> float:
        """Queries by keys, weights by values: two products."""
        return 4.0 * self.pairs * self._shape.q_size * self._shape.num_layers


def _generation(
    name: str,
    rows: _Rows,
    drawn: int,
    passes: int,
    least_passes: int,
    model: PricedModel,
    kv: int | None = None,
    int8: bool = False,
) -> Phase:
    """kv: positions whose keys and values are read; None: every row's once."""
    head = 2.0 * drawn * model.shape.head_parameters
    return Phase(
        name,
        "generate",
        rows.rows,
        rows.matrix_flops + rows.lora_flops + rows.attention_flops + head,
        passes * model.streamed_bytes,
        least_passes * model.streamed_bytes,
        model.shape.kv_elements * (rows.rows if kv is None else kv),
        int8,
    )


def _read_positions(groups: int, size: int, begin: int, length: int) -> int:
    """Of the keys that decoding reads, what a group shares once a step."""
    steps = length - 1
    return groups * (steps * begin + size * steps * (steps + 1) // 2)


def _plan(
    config: TrainConfig, lengths: Lengths, shape: ModelShape
) -> tuple[list[MicroBatch], list[int], int]:
    """The trainer's own plan for sequences of these lengths; where each sequence stops being its
    predecessor; and the most bytes that a part of the plan holds."""
    sequences = _sequences(config, lengths)
    starts = [lengths.prompter] * len(sequences)
    begins = [0, *(common(one, other) for one, other in itertools.pairwise(sequences))]
    own = [len(s) - begin for s, begin in zip(sequences, begins, strict=True)]
    until = [0, *itertools.accumulate(own)]
    number = {id(sequence): index for index, sequence in enumerate(sequences)}
    modules = len(select_modules(shape.linears, config.lora.target_modules)) // shape.num_layers
    threads = config.threads or core.available_cpus()

    def bytes_of(some: Sequence[Sequence[int]], _: Sequence[int], mode: Activations) -> int:
        first = number[id(some[0])]
        rows = len(some[0]) + until[first + len(some)] - until[first + 1]
        values = len(some) * config.rewrite.max_new_tokens
        return score_bytes(shape, modules, config.lora.rank, rows, values, mode, threads)

    plan = plan_micro_batches(
        sequences,
        starts,
        limit=config.memory_limit,
        bytes_of=bytes_of,
        activations=config.activations,
        most=config.micro_batch_size,
    )
    most = max(bytes_of(batch.of(sequences), (), batch.activations) for batch in plan)
    return plan, begins, most


def _sequences(config: TrainConfig, lengths: Lengths) -> list[list[int]]:
    """Made-up tokens that share what real ones do: a prompt's among its rewrites."""
    own = lengths.prompter - lengths.prompter_shared
    return [
        [0] * lengths.prompter_shared
        + [2 * prompt + 1] * own
        + [-rewrite - 1] * config.rewrite.max_new_tokens
        for prompt in range(config.prompts_per_step)
        for rewrite in range(config.num_rewrites)
    ]


def _scoring(
    config: TrainConfig,
    lengths: Lengths,
    model: PricedModel,
    lora: int,
    plan: Sequence[MicroBatch],
    begins: Sequence[int],
) -> Iterator[Phase]:
    """Policy and reference forward, the backward, and the vocabulary.

    The backward of a frozen matrix is one product (by its input), that of LoRA's two each, that of
    attention five where the forward is two. The vocabulary takes four products, two of them for
    the gradient (docs/performance.md).
    """
    shape = model.shape
    rows, again = _Rows(shape, lora), _Rows(shape, lora)
    length = lengths.prompter + config.rewrite.max_new_tokens
    for batch in plan:
        for begin in (0, *begins[batch.begin + 1 : batch.end]):
            rows.add(begin, length)
            if batch.activations == "recompute":
                again.add(begin, length)
    frozen = 0.0 if config.adapter is None else rows.lora_flops
    one_pass = len(plan) * model.bytes_per_parameter * shape.linear_parameters
    forward = 2 * (rows.matrix_flops + rows.attention_flops) + rows.lora_flops + frozen
    backward = rows.matrix_flops + 2 * rows.lora_flops + 2.5 * rows.attention_flops
    backward += again.matrix_flops + again.lora_flops + again.attention_flops
    yield Phase("score forward", "score", rows.rows, forward, one_pass, one_pass)
    yield Phase("score backward", "score", rows.rows, backward, one_pass, one_pass)
    values = len(begins) * config.rewrite.max_new_tokens
    head = len(plan) * model.bytes_per_parameter * shape.head_parameters
    flops = 4 * 2.0 * values * shape.head_parameters
    yield Phase("score vocabulary", "score", values, flops, head, head)


def _check_context(who: str, model: PricedModel, tokens: int) -> None:
    if tokens > model.shape.context_length:
        raise ValueError(
            f"{who}: sequences of {tokens} tokens exceed the context of {model.name}, "
            f"{model.shape.context_length}"
        )
