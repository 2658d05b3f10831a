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
from typing import Any, Literal

from alignpro.config import FitConfig, TrainConfig, target_of
from alignpro.models.adapter_files import is_mixture
from alignpro.models.mixture import read_mixture
from alignpro.native import core
from alignpro.price.lengths import Lengths
from alignpro.price.models import PricedModel
from alignpro.train.micro_batches import Activations, MicroBatch, fit_micro_batches, shared_prefix
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
    calls: int  # of the target, where it is not here
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
    lanes: int = 1  # of a mixture: adapters that read and write every position

    @property
    def samples(self) -> int:
        return self.contexts * self.size

    def phases(self) -> tuple[Phase, Phase]:
        """Reading the contexts, and writing the samples."""
        samples, steps, facts = self.samples, self.wrote - 1, self.model.facts
        read = _Rows(
            self.model,
            self.lora,
            (0, self.shared, 1),
            (self.shared, self.head, self.prompts),
            (self.head, self.length, self.contexts),
            # The last position is computed for every sample, which draws its first token there.
            (self.length - 1, self.length, samples - self.contexts),
        )
        written = _Rows(self.model, self.lora, (self.length, self.length + steps, samples))
        # Of the keys that decoding reads, what the samples of a context share once a step.
        own = self.size * steps * (steps + 1) // 2
        decoded = self.contexts * (steps * self.length + own)
        lanes = self.lanes
        batches, reads = -(-samples * lanes // ENGINE_ROWS), -(-read.count * lanes // ENGINE_ROWS)

        def phase(what: str, rows: _Rows, drawn: int, passes: int, least: int, kv: int) -> Phase:
            """drawn: tokens that are sampled. kv: positions whose keys and values are read."""
            layers = lanes * (rows.matrices + rows.lora + rows.attention)
            flops = layers + 2.0 * drawn * facts.head_parameters
            streamed, moved = self.model.streamed_bytes, lanes * facts.kv_elements * kv
            sizes = (lanes * rows.count, flops, passes * streamed, least * streamed, moved)
            return Phase(f"{self.who} {what}", "generate", *sizes, self.int8)

        return (
            phase("reads", read, samples, reads, 1, read.count),
            phase("writes", written, samples * steps, batches * steps, steps, decoded),
        )


def count_step(
    config: TrainConfig, lengths: Lengths, prompter: PricedModel, target: PricedModel | None
) -> Work:
    """The work of one step; with ``num_responses: auto``, of the dearest that it may choose.

    target: None behind an endpoint, whose work is not counted.
    """
    if config.algorithm == "closed_form":
        raise ValueError(
            "algorithm: the time of closed_form is not priced; `price_fit` says memory"
        )
    if config.tuner != "lora":
        raise ValueError(f"tuner: {config.tuner} is not priced; lora is")
    sampled, calls = _samplings(config, lengths, prompter, target)
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
    phases: list[Phase] = []
    counts: dict[str, int] = {}
    held = 0
    for one in sampled:
        reads, writes = one.phases()
        phases += (reads, writes)
        counts |= {reads.name: reads.rows, writes.name: one.samples * one.wrote}
        held += (reads.rows + writes.rows) * one.model.facts.kv_elements
    return Work(
        phases=(*phases, *score),
        calls=calls,
        tokens={
            **counts,
            "generated": sum(one.samples * one.wrote for one in sampled),
            "scored forward": 2 * forward,
            "scored backward": forward,
        },
        lora_parameters=trained.lora,
        kv_elements=held,
        alone_kv_elements=sum(
            one.lanes * (one.length + one.wrote) * one.model.facts.kv_elements for one in sampled
        ),
        score_bytes=most,
        micro_batches=len(plan),
    )


def _samplings(
    config: TrainConfig, lengths: Lengths, prompter: PricedModel, target: PricedModel | None
) -> tuple[tuple[_Sampling, ...], int]:
    """Who samples here in a step, of whom the first is trained; and the calls to an endpoint."""
    rewrites, responses = config.num_rewrites, config.num_responses
    if responses == "auto":
        assert config.response_budget is not None  # the configuration's rule
        rewrites, responses = config.response_budget, 1  # more of both models' tokens than any
    prompts = config.prompts_per_step
    tuned = config.policy == "target"
    model, length = prompter, lengths.prompter
    if tuned:
        assert target is not None  # the configuration's rule
        model, length = target, lengths.target_raw
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
        return (trained,), 0
    if target is None:
        return (trained,), prompts * rewrites * responses
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
        lanes=_lanes(target_of(config.prompter, config.target).adapter),
    )
    return (trained, answers), 0


def _lanes(folder: str | None) -> int:
    if folder is None or not is_mixture(folder):
        return 1
    return sum(weight != 0 for _, weight in read_mixture(folder).members)


def lora_parameters(model: PricedModel, config: FitConfig) -> int:
    modules = select_modules(model.facts.lora_modules, config.lora.target_modules)
    return config.lora.rank * sum(rows + cols for rows, cols in modules.values())


def score_bytes(model: PricedModel, config: FitConfig, threads: int | None, **options: Any) -> int:
    """What a score of LoRA matrices holds. options: of `core.ModelFacts.score_bytes`."""
    modules = select_modules(model.facts.lora_modules, config.lora.target_modules)
    return model.facts.score_bytes(
        **options,
        modules=list(modules),
        rank=config.lora.rank,
        threads=threads or core.available_cpus(),
    )


class _Rows:
    """Positions that pass through a model's layers, and the operations they take there.

    spans: positions [begin, end) of so many sequences; each position sees those up to itself.
    """

    def __init__(self, model: PricedModel, lora: int, *spans: tuple[int, int, int]) -> None:
        config = model.facts.config
        width = config["num_heads"] * config["head_dim"] * config["num_layers"]
        self.count = sum(number * (end - begin) for begin, end, number in spans)
        pairs = sum(n * (end * (end + 1) - begin * (begin + 1)) for begin, end, n in spans) / 2
        self.matrices = 2.0 * self.count * model.facts.layer_parameters
        self.lora = 2.0 * self.count * lora
        # Queries by keys, weights by values: two products.
        self.attention = 4.0 * pairs * float(width)


def _plan(config: TrainConfig, trained: _Sampling) -> tuple[list[MicroBatch], list[int], int]:
    """The trainer's own plan for sequences of these lengths; where each sequence stops being its
    predecessor; and the most bytes that a part of the plan holds."""
    own = trained.length - trained.shared
    # Made-up tokens that share what real ones do: a prompt's among its samples.
    sequences = [
        [0] * trained.shared + [2 * prompt + 1] * own + [2 * sample + 2] * trained.wrote
        for prompt in range(trained.prompts)
        for sample in range(trained.size)
    ]
    starts = [trained.length] * len(sequences)
    begins = [0, *(shared_prefix(one, other) for one, other in itertools.pairwise(sequences))]
    number = {id(sequence): index for index, sequence in enumerate(sequences)}

    @functools.cache
    def bytes_at(first: int, count: int, mode: Activations) -> int:
        part = {"sequences": sequences[first : first + count], "starts": starts[:count]}
        options = {"with_reference": True, "activations": mode}
        return score_bytes(trained.model, config, config.threads, **part, **options)

    def bytes_of(some: Sequence[Sequence[int]], _: Sequence[int], mode: Activations) -> int:
        # One prompt is like the other: only the place in its group matters.
        return bytes_at(number[id(some[0])] % trained.size, len(some), mode)

    plan = fit_micro_batches(sequences, starts, config, bytes_of)
    most = max(bytes_of(batch.of(sequences), (), batch.activations) for batch in plan)
    return plan, begins, most


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
    length = trained.length + trained.wrote
    spans = [
        (batch.activations, (begin, length, passes))
        for batch in plan
        for begin in (0, *begins[batch.begin + 1 : batch.end])
    ]
    rows = _Rows(model, trained.lora, *(span for _, span in spans))
    again = _Rows(model, trained.lora, *(span for mode, span in spans if mode == "recompute"))
    frozen = 0.0 if config.trained.adapter is None else rows.lora
    one_pass = float(passes * len(plan) * model.matrix_bytes["layers"])
    forward = 2 * (rows.matrices + rows.attention) + rows.lora + frozen
    backward = rows.matrices + 2 * rows.lora + 2.5 * rows.attention
    backward += again.matrices + again.lora + again.attention
    yield Phase("score forward", "score", rows.count, forward, one_pass, one_pass)
    yield Phase("score backward", "score", rows.count, backward, one_pass, one_pass)
    values = passes * len(begins) * trained.wrote
    head = float(passes * len(plan) * model.matrix_bytes["head"])
    flops = 4 * 2.0 * values * model.facts.head_parameters
    yield Phase("score vocabulary", "score", values, flops, head, head)
