"""What a step of training computes, counted from shapes and lengths.

A multiply-add is two operations. Norms, rotations and activations are left out: under a hundredth
of the matrices. Every rewrite and response is taken to run to its maximum; nothing is computed
twice that sequences share at their beginning, as in the engine.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from alignpro.config import TrainConfig, target_of
from alignpro.native import core
from alignpro.price.lengths import Lengths
from alignpro.price.models import PricedModel
from alignpro.train.micro_batches import Activations, MicroBatch, plan_micro_batches, shared_prefix
from alignpro.train.policy import select_modules

ENGINE_ROWS = 256  # tokens in one forward of the engine

Kind = Literal["generate", "score"]


@dataclass(frozen=True)
class Phase:
    name: str
    kind: Kind
    rows: int  # positions that pass through the layers
    flops: float
    # Read, each operand once a pass: weights, and with as few passes as the order of tokens allows.
    weight_bytes: float
    least_weight_bytes: float
    kv_elements: float = 0.0  # of keys and values that are read
    int8: bool = False  # in int8 products


@dataclass(frozen=True)
class Work:
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


@dataclass(frozen=True)
class _Sampling:
    """Sequences of one model in a step: what they read, what of it they share, what they write."""

    who: Literal["prompter", "target"]
    model: PricedModel
    lora: int  # parameters of an adapter
    prompts: int
    contexts: int  # that are read: the prompts, or all rewrites
    size: int  # samples of a context
    shared: int  # tokens common to all prompts
    head: int  # common to all contexts of a prompt
    length: int  # of a context
    wrote: int
    int8: bool = False

    @property
    def samples(self) -> int:
        return self.contexts * self.size

    def reads(self) -> _Rows:
        rows = _Rows(self.model, self.lora)
        rows.add(0, self.shared)
        rows.add(self.shared, self.head, self.prompts)
        rows.add(self.head, self.length, self.contexts)
        # The last position is computed for every sample, which draws its first token there.
        rows.add(self.length - 1, self.length, self.samples - self.contexts)
        return rows

    def writes(self) -> _Rows:
        rows = _Rows(self.model, self.lora)
        rows.add(self.length, self.length + self.wrote - 1, self.samples)
        return rows

    def phases(self) -> tuple[Phase, Phase]:
        """Reading the contexts, and writing the samples."""
        read, written, steps = self.reads(), self.writes(), self.wrote - 1
        # Of the keys that decoding reads, what the samples of a context share once a step.
        own = self.size * steps * (steps + 1) // 2
        decoded = self.contexts * (steps * self.length + own)
        batches = -(-self.samples // ENGINE_ROWS)
        return (
            self._phase("reads", read, self.samples, -(-read.rows // ENGINE_ROWS), 1, read.rows),
            self._phase("writes", written, self.samples * steps, batches * steps, steps, decoded),
        )

    def _phase(
        self, what: str, rows: _Rows, drawn: int, passes: int, least_passes: int, kv: int
    ) -> Phase:
        """drawn: tokens that are sampled. kv: positions whose keys and values are read."""
        head = 2.0 * drawn * self.model.facts.head_parameters
        return Phase(
            f"{self.who} {what}",
            "generate",
            rows.rows,
            rows.matrix_flops + rows.lora_flops + rows.attention_flops + head,
            passes * self.model.streamed_bytes,
            least_passes * self.model.streamed_bytes,
            self.model.facts.kv_elements * kv,
            self.int8,
        )


def count_step(
    config: TrainConfig, lengths: Lengths, prompter: PricedModel, target: PricedModel
) -> Work:
    """The work of one step; with ``num_responses: auto``, of the dearest that it may choose.

    Raises:
        ValueError: a rewrite that does not fit ``memory_limit`` alone, a sequence over a context,
            or the closed form, whose steps are not all alike.
    """
    if config.algorithm == "closed_form":
        raise ValueError("algorithm: closed_form is not priced: it samples once and then fits")
    sampled = _samplings(config, lengths, prompter, target)
    for one in sampled:
        tokens, limit = one.length + one.wrote, one.model.facts.config["context_length"]
        if tokens > limit:
            raise ValueError(
                f"{one.who}: sequences of {tokens} tokens exceed the context of {one.model.name}, "
                f"{limit}"
            )
    trained = sampled[0]
    plan, begins, most = _plan(config, trained)
    passes = config.ppo.epochs if config.algorithm == "ppo" else 1
    score = tuple(_scoring(config, trained, plan, begins, passes))
    forward = score[0].rows
    counts: dict[str, int] = {}
    for one in sampled:
        counts[f"{one.who} reads"] = one.reads().rows
        counts[f"{one.who} writes"] = one.samples * one.wrote
    return Work(
        phases=tuple(phase for one in sampled for phase in one.phases()) + score,
        tokens={
            **counts,
            "generated": sum(one.samples * one.wrote for one in sampled),
            "scored forward": 2 * forward,
            "scored backward": forward,
        },
        lora_parameters=trained.lora,
        kv_elements=sum(
            (one.reads().rows + one.writes().rows) * one.model.facts.kv_elements for one in sampled
        ),
        alone_kv_elements=sum(
            (one.length + one.wrote) * one.model.facts.kv_elements for one in sampled
        ),
        score_bytes=most,
        micro_batches=len(plan),
    )


def _samplings(
    config: TrainConfig, lengths: Lengths, prompter: PricedModel, target: PricedModel
) -> tuple[_Sampling, ...]:
    """Who samples in a step; the first is trained."""
    rewrites, responses = config.num_rewrites, config.num_responses
    if responses == "auto":
        assert config.response_budget is not None  # the configuration's rule
        rewrites, responses = config.response_budget, 1  # more of both models' tokens than any
    prompts = config.prompts_per_step
    tuned = config.policy == "target"
    model, length = (target, lengths.target_raw) if tuned else (prompter, lengths.prompter)
    trained = _Sampling(
        "target" if tuned else "prompter",
        model,
        lora_parameters(model, config),
        prompts=prompts,
        contexts=prompts,
        size=rewrites,
        shared=lengths.target_shared if tuned else lengths.prompter_shared,
        head=length,
        length=length,
        wrote=(config.response if tuned else config.rewrite).max_new_tokens,
    )
    if tuned:
        return (trained,)
    answers = _Sampling(
        "target",
        target,
        0,
        prompts=prompts,
        contexts=prompts * rewrites,
        size=responses,
        shared=lengths.target_shared,
        head=lengths.target_head,
        length=lengths.target,
        wrote=config.response.max_new_tokens,
        int8=target_of(config.prompter, config.target).compute == "int8",
    )
    return trained, answers


def lora_parameters(model: PricedModel, config: TrainConfig) -> int:
    modules = select_modules(model.facts.lora_modules, config.lora.target_modules)
    return config.lora.rank * sum(rows + cols for rows, cols in modules.values())


@dataclass
class _Rows:
    """Positions that pass through a model's layers, and what attention and matrices make of it."""

    model: PricedModel
    lora: int
    rows: int = 0
    pairs: float = 0.0

    def add(self, begin: int, end: int, sequences: int = 1) -> None:
        """Positions [begin, end) of each sequence, each of which sees those up to itself."""
        self.rows += sequences * (end - begin)
        self.pairs += sequences * (end * (end + 1) - begin * (begin + 1)) / 2

    @property
    def matrix_flops(self) -> float:
        return 2.0 * self.rows * self.model.facts.layer_parameters

    @property
    def lora_flops(self) -> float:
        return 2.0 * self.rows * self.lora

    @property
    def attention_flops(self) -> float:
        """Queries by keys, weights by values: two products."""
        config = self.model.facts.config
        width = config["num_heads"] * config["head_dim"] * config["num_layers"]
        return 4.0 * self.pairs * float(width)


def _plan(config: TrainConfig, trained: _Sampling) -> tuple[list[MicroBatch], list[int], int]:
    """The trainer's own plan for sequences of these lengths; where each sequence stops being its
    predecessor; and the most bytes that a part of the plan holds."""
    sequences = _sequences(trained)
    starts = [trained.length] * len(sequences)
    begins = [0, *(shared_prefix(one, other) for one, other in itertools.pairwise(sequences))]
    number = {id(sequence): index for index, sequence in enumerate(sequences)}
    modules = list(select_modules(trained.model.facts.lora_modules, config.lora.target_modules))
    threads = config.threads or core.available_cpus()

    @functools.cache
    def bytes_at(first: int, count: int, mode: Activations) -> int:
        return trained.model.facts.score_bytes(
            sequences[first : first + count],
            starts[:count],
            modules=modules,
            rank=config.lora.rank,
            with_reference=True,
            activations=mode,
            threads=threads,
        )

    def bytes_of(some: Sequence[Sequence[int]], _: Sequence[int], mode: Activations) -> int:
        # One prompt is like the other: only the place in its group matters.
        return bytes_at(number[id(some[0])] % trained.size, len(some), mode)

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


def _sequences(trained: _Sampling) -> list[list[int]]:
    """Made-up tokens that share what real ones do: a prompt's among its samples."""
    own = trained.length - trained.shared
    return [
        [0] * trained.shared + [2 * prompt + 1] * own + [2 * sample + 2] * trained.wrote
        for prompt in range(trained.prompts)
        for sample in range(trained.size)
    ]


def _scoring(
    config: TrainConfig,
    trained: _Sampling,
    plan: Sequence[MicroBatch],
    begins: Sequence[int],
    passes: int,
) -> Iterator[Phase]:
    """Policy and reference forward, the backward, and the vocabulary; ``passes`` times.

    The backward of a frozen matrix is one product (by its input), that of LoRA's two each, that of
    attention five where the forward is two. The vocabulary takes four products, two of them for
    the gradient (docs/notes/performance.md).
    """
    model = trained.model
    rows, again = _Rows(model, trained.lora), _Rows(model, trained.lora)
    length = trained.length + trained.wrote
    for batch in plan:
        for begin in (0, *begins[batch.begin + 1 : batch.end]):
            rows.add(begin, length, passes)
            if batch.activations == "recompute":
                again.add(begin, length, passes)
    frozen = 0.0 if config.trained.adapter is None else rows.lora_flops
    one_pass = float(passes * len(plan) * model.matrix_bytes["layers"])
    forward = 2 * (rows.matrix_flops + rows.attention_flops) + rows.lora_flops + frozen
    backward = rows.matrix_flops + 2 * rows.lora_flops + 2.5 * rows.attention_flops
    backward += again.matrix_flops + again.lora_flops + again.attention_flops
    yield Phase("score forward", "score", rows.rows, forward, one_pass, one_pass)
    yield Phase("score backward", "score", rows.rows, backward, one_pass, one_pass)
    values = passes * len(begins) * trained.wrote
    head = float(passes * len(plan) * model.matrix_bytes["head"])
    flops = 4 * 2.0 * values * model.facts.head_parameters
    yield Phase("score vocabulary", "score", values, flops, head, head)
