"""The trained model as torch sees it: an adapter's numbers as parameters, the engine's scores as
nodes.

The transformer and its backward are the engine's (MATH: linear_logprob); torch holds the numbers,
the loss and the optimizer. `Policy.score` is the one place where they meet.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from alignpro.config import FitConfig, LoraConfig, PreferConfig, SftConfig, TrainConfig
from alignpro.models.adapter import AdapterWeights, LoraWeights, save_peft
from alignpro.models.native_model import NativeModel
from alignpro.models.prompter_file import save_prompter
from alignpro.models.soft_prompt import SoftRows
from alignpro.pipeline import Pipeline
from alignpro.train.micro_batches import Activations, MicroBatch, fit_micro_batches

Array = NDArray[np.float32]
Matrices = dict[str, tuple[Array, Array]]
Reference = AdapterWeights | Literal["base"]


@dataclass(frozen=True)
class ScoreTensors:
    """Flat float32 tensors, sequences one after another: [sum(len - start)]."""

    logprob: torch.Tensor  # of the token, differentiable
    entropy: torch.Tensor  # of the distribution it was drawn from, nats, differentiable
    kl: torch.Tensor | None  # KL(policy || reference) of that distribution, exact, differentiable
    reference_logprob: torch.Tensor | None  # of the token under the reference; a constant
    hidden: torch.Tensor | None = None  # [T, D] the policy's state before the token; a constant


class Policy(torch.nn.Module):
    """A model's base weights, frozen in the engine, with a trainable adapter: `LoraPolicy`, or
    `SoftPromptPolicy` of train.soft_prompt. Its parameters are the adapter's numbers."""

    def __init__(self, model: NativeModel) -> None:
        super().__init__()
        self.model = model
        self._core = model.core_model
        self._in_engine: tuple[list[Array], Any] | None = None

    def weights(self) -> AdapterWeights:
        """A copy of the adapter as it is now."""
        raise NotImplementedError

    def load_weights(self, weights: Any) -> None:
        """Overwrite the numbers in place, keeping the parameters an optimizer may hold. Raises
        ValueError for an adapter of another layout."""
        raise NotImplementedError

    def _in_order(self, by_name: Mapping[str, Any]) -> list[Array]:
        """The engine's gradients in the order of the parameters."""
        raise NotImplementedError

    def _arrays(self, weights: Any) -> list[Array]:
        """The numbers of `weights` in the order of the parameters."""
        raise NotImplementedError

    @property
    def rows(self) -> SoftRows | None:
        """Where rows of a soft prompt stand in what the policy reads; None where it has none."""
        return None

    def core_adapter(self) -> Any:
        """The engine's adapter for the numbers as they are now; made anew when they changed.

        Compared by content (5 million floats: some milliseconds), because torch's version counters
        miss a fused optimizer's update and an assignment to ``.data``, and a stale adapter would
        pass unnoticed.
        """
        known = self._in_engine
        now = [_numpy(parameter) for parameter in self.parameters()]
        if known is None or not all(map(np.array_equal, now, known[0])):
            weights = self.weights()
            self._in_engine = (self._arrays(weights), self.model.make_adapter(weights))
        assert self._in_engine is not None
        return self._in_engine[1]

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        temperature: float = 1.0,
        reference: Reference | None = None,
        anchors: Sequence[Sequence[int] | None] = (),
        activations: Activations = "keep",
        with_hidden: bool = False,
    ) -> ScoreTensors:
        """Score tokens [start, len) of every sequence, differentiable by the parameters.

        Equal, in PyTorch, to ``log_softmax(logits / temperature)`` gathered at the tokens, its
        entropy, and ``kl_div`` against the reference over the whole vocabulary.

        Args:
            sequences: token ids, and those of a soft prompt's rows (models.soft_prompt). starts:
                the first scored position of each, 1 <= start <= len; no row is scored.
            reference: a frozen adapter or "base"; None leaves ``kl`` and ``reference_logprob``
                None.
            anchors: for each sequence, what the reference reads in the place of the tokens before
                ``starts``; None, or none at all: the same as the policy.
            activations: kept for the backward, or recomputed in it: less memory, the same bits.
            with_hidden: also the final normalised hidden state that each token was predicted from,
                as a value head reads it; detached.

        Raises:
            ValueError: a sequence or start that does not fit.
        """
        inputs = list(self.parameters())
        reference_adapter = (
            None if reference in (None, "base") else self.model.make_adapter(reference)
        )
        reference_hidden = None
        if reference is not None and any(anchor is not None for anchor in anchors):
            read = [
                list(sequence[:start] if anchor is None else anchor)
                for sequence, start, anchor in zip(sequences, starts, anchors, strict=True)
            ]
            reference_hidden = self._core.score(
                [r + list(s[n:]) for r, s, n in zip(read, sequences, starts, strict=True)],
                [len(r) for r in read],
                adapter=reference_adapter,
                with_hidden=True,
            ).hidden
        keep_graph = torch.is_grad_enabled() and any(p.requires_grad for p in inputs)
        score = self._core.score(
            [list(s) for s in sequences],
            list(starts),
            adapter=self.core_adapter(),
            temperature=temperature,
            reference=reference_adapter,
            with_reference=reference is not None,
            keep_graph=keep_graph,
            activations=activations,
            with_hidden=with_hidden,
            reference_hidden=reference_hidden,
        )
        # Large, and the caller's own array already: not copied once more.
        hidden = torch.from_numpy(score.hidden) if with_hidden else None
        in_order = self._in_order if keep_graph else None
        flat = _EngineScore.apply(score, in_order, *inputs)  # type: ignore[no-untyped-call]
        logprob, entropy, kl, reference_logprob = flat
        return ScoreTensors(logprob, entropy, kl, reference_logprob, hidden)

    def micro_batches(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        config: FitConfig,
        *,
        with_reference: bool,
        with_hidden: bool = False,
        together: int = 1,
    ) -> list[MicroBatch]:
        """How to score the sequences within the configuration's ``memory_limit``. together: as of
        `fit_micro_batches`; ``micro_batch_size`` counts such groups."""
        bytes_of = functools.partial(
            self.score_bytes, with_reference=with_reference, with_hidden=with_hidden
        )
        return fit_micro_batches(sequences, starts, config, bytes_of, together=together)

    def score_bytes(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        activations: Activations = "keep",
        *,
        with_reference: bool,
        with_hidden: bool = False,
    ) -> int:
        """Bytes that `score` and its backward hold at most, beside weights and gradients."""
        # The shapes alone count, so an adapter of older numbers does as well.
        adapter = self._in_engine[1] if self._in_engine is not None else self.core_adapter()
        return self._core.score_bytes(
            [list(s) for s in sequences],
            list(starts),
            adapter=adapter,
            with_reference=with_reference,
            keep_graph=True,
            activations=activations,
            with_hidden=with_hidden,
        )


class LoraPolicy(Policy):
    """LoRA matrices. For module ``names[i]``: ``lora_a[i]`` is A [rank, in], ``lora_b[i]`` is
    B [out, rank], and the layer computes W x + scale * B (A x) (arXiv 2106.09685)."""

    def __init__(self, model: NativeModel, weights: LoraWeights) -> None:
        super().__init__(model)
        if not isinstance(weights, LoraWeights):
            raise ValueError(f"adapter: expected LoraWeights, got {type(weights).__name__}")
        self._layout = replace(weights, matrices={}, base_model_name=model.published_name)
        self.names = list(weights.matrices)
        a, b = self._halves(weights.matrices)
        self.lora_a = torch.nn.ParameterList(map(as_parameter, a))
        self.lora_b = torch.nn.ParameterList(map(as_parameter, b))

    @classmethod
    def fresh(cls, model: NativeModel, config: LoraConfig, *, seed: int) -> LoraPolicy:
        """New matrices: A Kaiming-uniform (a = sqrt 5), B zero: the policy starts as the base."""
        return cls(model, initial_weights(model, config, seed=seed))

    def weights(self) -> LoraWeights:
        triples = zip(self.names, self.lora_a, self.lora_b, strict=True)
        copies = {name: (_numpy(a).copy(), _numpy(b).copy()) for name, a, b in triples}
        return replace(self._layout, matrices=copies, base_fingerprint=self.model.fingerprint)

    def load_weights(self, weights: LoraWeights) -> None:
        def layout(of: LoraWeights, names: Collection[str]) -> str:
            return f"rank {of.rank}, alpha {of.alpha}, rslora {of.rslora} and {len(names)} modules"

        mine, theirs = layout(self._layout, self.names), layout(weights, weights.matrices)
        if mine != theirs or set(self.names) != set(weights.matrices):
            other = " of other names" if mine == theirs else ""
            raise ValueError(f"adapter: expected {mine}, got {theirs}{other}")
        given = self._arrays(weights)
        with torch.no_grad():
            for parameter, matrix in zip(self.parameters(), given, strict=True):
                parameter.copy_(torch.from_numpy(matrix))

    def _halves(self, matrices: Mapping[str, tuple[Array, Array]]) -> tuple[list[Array], ...]:
        return tuple([matrices[name][half] for name in self.names] for half in (0, 1))

    def _in_order(self, by_name: Mapping[str, Any]) -> list[Array]:
        a, b = self._halves(by_name)
        return [*a, *b]

    def _arrays(self, weights: LoraWeights) -> list[Array]:
        return self._in_order(weights.matrices)


def with_policy(pipeline: Pipeline, policy: Policy, config: TrainConfig) -> Pipeline:
    """The pipeline with the policy, as it is now, in the place of the model that it trains."""
    adapter = policy.core_adapter()
    if config.policy == "target":
        return pipeline.with_target_adapter(adapter)
    return pipeline.with_adapter(adapter)


def save_trained(
    folder: Path, policy: Policy, config: TrainConfig | PreferConfig | SftConfig
) -> None:
    """Write the adapter that training made; of a prompter, how it reads and writes prompts, too."""
    weights = policy.weights()
    if isinstance(config, SftConfig) or config.policy == "prompter":
        tokenizer = policy.model.tokenizer
        save_prompter(folder, weights, tokenizer, config.prompting, config.rewrite)
    else:
        save_peft(folder, weights)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's own arithmetic on the calling thread.

    The work is the engine's, which has a thread team; what is left to torch is small. A second
    team that spins between its pieces takes the cores from the first: an AdamW step over 420
    matrices took 3.3 s on two busy cores with torch's default, and 0.005 s like this.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def initial_weights(model: NativeModel, config: LoraConfig, *, seed: int) -> LoraWeights:
    """Fresh LoRA matrices for the configured modules, drawn from a generator of their own."""
    modules = select_modules(model.lora_modules, config.target_modules)
    generator = torch.Generator().manual_seed(seed % 2**63)
    matrices: Matrices = {}
    for name, (out_features, in_features) in modules.items():
        a = torch.empty(config.rank, in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        matrices[name] = (a.numpy(), np.zeros((out_features, config.rank), np.float32))
    return LoraWeights(
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        matrices=matrices,
        base_model_name=model.published_name,
    )


def select_modules(
    modules: dict[str, tuple[int, int]], targets: Literal["all-linear"] | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """The modules whose path ends with one of ``targets`` ("q_proj", "layers.0.mlp.up_proj")."""
    if targets == "all-linear":
        return dict(modules)
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not found:
            known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules))
            raise ValueError(f'target_modules: the model has no module "{target}"; it has {known}')
        chosen.update(found)
    return {name: shape for name, shape in modules.items() if name in chosen}


class _EngineScore(torch.autograd.Function):
    """The engine's score and its backward as one node of torch's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        score: Any,
        in_order: Callable[[Mapping[str, Any]], list[Array]] | None,
        *parameters: torch.Tensor,
    ) -> tuple[Any, ...]:
        """in_order: the engine's gradients as the parameters stand; None keeps no graph."""
        ctx.set_materialize_grads(False)
        ctx.score, ctx.in_order = None if in_order is None else score, in_order
        outputs = tuple(
            None if values is None else torch.from_numpy(np.array(values, np.float32))
            for values in (score.logprob, score.entropy, score.kl, score.reference_logprob)
        )
        if outputs[3] is not None:
            ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.score is None:
            raise RuntimeError("the graph of this score is spent: call score() again")
        score, ctx.score = ctx.score, None
        d_logprob, d_entropy, d_kl = (_upstream(g) for g in upstream[:3])
        if d_logprob is None:
            d_logprob = np.zeros(len(score.logprob), np.float32)
        gradients = score.backward(d_logprob, d_entropy, d_kl)
        return (None, None, *map(torch.from_numpy, ctx.in_order(gradients)))


def _upstream(gradient: torch.Tensor | None) -> Array | None:
    """A contiguous float32 copy: torch hands over expanded and strided gradients as well."""
    if gradient is None:
        return None
    array: Array = gradient.detach().to(torch.float32).contiguous().numpy()
    return array


def as_parameter(array: Array) -> torch.nn.Parameter:
    """Of a copy."""
    return torch.nn.Parameter(torch.from_numpy(np.array(array, np.float32)))


def _numpy(parameter: torch.Tensor) -> Array:
    array: Array = parameter.detach().contiguous().numpy()
    return array
