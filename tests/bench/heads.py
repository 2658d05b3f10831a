"""The vocabulary projection with log-probability and KL: inputs, and everybody who computes it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from alignpro.bench.machine import available_bytes
from alignpro.ops import QuantizedWeight, linear_logprob

LOGIT_DEVIATION = 6.0  # of a trained model's logits over the vocabulary
REFERENCE_DISTANCE = 0.15  # of the reference's hidden states, in deviations of the policy's
_SAMPLE_ROWS = 4096

BOTH = "logprob, KL"
LOGPROB = "logprob"


class Unavailable(Exception):
    """Why something cannot be measured here."""


@dataclass(frozen=True)
class HeadSpec:
    """What the inputs are made from, the same in every process.

    Args:
        model: file or folder whose head to use; None draws a random one.
    """

    vocab_size: int
    hidden_size: int
    num_tokens: int
    model: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states of T tokens under policy and reference, and the head they share."""

    spec: HeadSpec
    weight: torch.Tensor  # [V, D] float32, frozen
    stored: QuantizedWeight | None  # the model's matrix as it stands in its file
    is_random: bool  # the weight is, and so differs from the stored one
    hidden: torch.Tensor  # [T, D]
    reference_hidden: torch.Tensor  # [T, D]
    tokens: torch.Tensor  # [T]
    d_logprob: torch.Tensor  # [T] derivative of the loss by each log-probability
    d_kl: torch.Tensor  # [T] likewise

    def first(self, tokens: int) -> HeadInputs:
        """The same inputs, fewer tokens."""
        rows = ("hidden", "reference_hidden", "tokens", "d_logprob", "d_kl")
        cut = {name: getattr(self, name)[:tokens].clone() for name in rows}
        return HeadInputs(self.spec, self.weight, self.stored, self.is_random, **cut)


# Given inputs and the policy's hidden states: outputs of [T], or one scalar that is the loss.
Compute = Callable[[HeadInputs, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a head. Products are [T, D] x [D, V] and the like: 2 T V D operations."""

    name: str
    computes: str
    least_products: tuple[int, int]  # forward; forward and backward to the hidden states
    products: tuple[int, int]  # those that are run
    prepare: Callable[[HeadInputs], Compute]  # raises Unavailable
    compiles: bool = False  # needs a run at full size before its memory means anything
    ours: bool = False


def make_inputs(spec: HeadSpec) -> HeadInputs:
    """Hidden states scaled so that logits deviate as a trained model's do."""
    draw = torch.Generator().manual_seed(spec.seed)
    weight, stored = None, None
    if spec.model is not None:
        weight, stored = head_of(Path(spec.model))
    is_random = weight is None
    if weight is None:
        shape = (spec.vocab_size, spec.hidden_size)
        weight = torch.randn(shape, generator=draw).mul_(0.1)
    shape = (spec.num_tokens, spec.hidden_size)
    hidden = torch.randn(shape, generator=draw)
    rows = torch.randint(len(weight), (_SAMPLE_ROWS,), generator=draw)
    hidden *= LOGIT_DEVIATION / float((hidden[:64] @ weight[rows].T).std())
    noise = torch.randn(shape, generator=draw) * (REFERENCE_DISTANCE * float(hidden.std()))
    return HeadInputs(
        spec=spec,
        weight=weight,
        stored=stored,
        is_random=is_random,
        hidden=hidden,
        reference_hidden=hidden + noise,
        tokens=torch.randint(len(weight), (spec.num_tokens,), generator=draw),
        d_logprob=torch.randn(spec.num_tokens, generator=draw),
        d_kl=torch.randn(spec.num_tokens, generator=draw),
    )


def head_of(path: Path) -> tuple[torch.Tensor | None, QuantizedWeight | None]:
    """A model's head in float32, and as it is stored; None for what cannot be read here.

    The float32 matrix of a GGUF file, which only the others need, is widened by the package gguf.
    """
    if path.is_dir():
        return _head_of_folder(path), None
    stored = None
    for name in ("output.weight", "token_embd.weight"):  # tied where the first is missing
        with contextlib.suppress(ValueError):
            stored = QuantizedWeight.from_gguf(path, name)
            break
    if stored is None or importlib.util.find_spec("gguf") is None:
        return None, stored
    gguf = importlib.import_module("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    tensor = tensors.get("output.weight") or tensors["token_embd.weight"]
    matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(matrix).to(torch.float32).clone(), stored


def _head_of_folder(path: Path) -> torch.Tensor | None:
    from safetensors import safe_open

    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118  no mapping
                    matrix: torch.Tensor = tensors.get_tensor(name)
                    return matrix.to(torch.float32).clone()
    return None


def forward(compute: Compute, inputs: HeadInputs) -> tuple[torch.Tensor, ...]:
    """The outputs, without a graph."""
    with torch.no_grad():
        return compute(inputs, inputs.hidden)


def forward_backward(
    compute: Compute, inputs: HeadInputs
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Outputs and the derivative of sum(upstream * output) by the hidden states."""
    hidden = inputs.hidden.detach().requires_grad_()
    outputs = compute(inputs, hidden)
    loss = torch.zeros(())
    for output, upstream in zip(outputs, (inputs.d_logprob, inputs.d_kl), strict=False):
        loss = loss + ((output * upstream).sum() if output.dim() else output)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return tuple(output.detach() for output in outputs), hidden.grad


# --- ours ---


def _ours(inputs: HeadInputs) -> Compute:
    return _engine(inputs.weight)


def _ours_stored(inputs: HeadInputs) -> Compute:
    if inputs.stored is None:
        raise Unavailable("the head does not come from a GGUF file")
    return _engine(inputs.stored)


def _engine(weight: torch.Tensor | QuantizedWeight) -> Compute:
    def compute(inputs: HeadInputs, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = linear_logprob(
            hidden, weight, inputs.tokens, reference_hidden=inputs.reference_hidden
        )
        assert result.kl is not None
        return result.logprob, result.kl

    return compute


def _ours_logprob(inputs: HeadInputs) -> Compute:
    def compute(inputs: HeadInputs, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (linear_logprob(hidden, inputs.weight, inputs.tokens).logprob,)

    return compute


# --- the others ---


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    policy = functional.log_softmax(hidden @ weight.T, dim=-1)
    with torch.no_grad():
        other = functional.log_softmax(reference @ weight.T, dim=-1)
    kl = (policy.exp() * (policy - other)).sum(-1)
    return policy.gather(-1, tokens[:, None]).squeeze(-1), kl


def _torch(inputs: HeadInputs) -> Compute:
    _needs_memory(inputs)
    return lambda given, hidden: _plain(hidden, given.weight, given.reference_hidden, given.tokens)


def _torch_compiled(inputs: HeadInputs) -> Compute:
    _needs_memory(inputs)
    compiled = torch.compile(_plain, dynamic=False)
    return lambda given, hidden: compiled(
        hidden, given.weight, given.reference_hidden, given.tokens
    )


def _torch_cross_entropy(inputs: HeadInputs) -> Compute:
    """Its chunked path. The chunks are of our choosing: at 256 tokens x 49152 x 576 its own choice
    took 14 s where this one took 0.36 s."""
    op: Any = getattr(functional, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None or options is None:
        raise Unavailable("this torch has no linear_cross_entropy")
    chunks = options(acc_policy="compact", batch_chunk_size=256)

    def compute(given: HeadInputs, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss: torch.Tensor = op(
            hidden, given.weight, given.tokens, reduction="none", options=chunks
        )
        return (-loss,)

    return compute


def _liger_divergence(inputs: HeadInputs) -> Compute:
    """Half the mean of -logprob and half that of KL: the only exact KL to a reference it has."""
    loss: Any = _module("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearJSDLoss
    _needs_memory(inputs)
    module = loss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=1.0)
    return lambda given, hidden: (
        module(hidden, given.weight, given.reference_hidden, given.weight, given.tokens),
    )


def _liger_triton(inputs: HeadInputs) -> Compute:
    op: Any = _module(
        "liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel"
    ).LigerFusedLinearCrossEntropyFunction

    def compute(given: HeadInputs, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            return (op.apply(hidden, given.weight, given.tokens)[0],)
        except Exception as error:
            raise Unavailable(f"does not run on a CPU: {_first_line(error)}") from None

    return compute


def _apple(inputs: HeadInputs) -> Compute:
    """Cut cross entropy; its backward leaves out what it takes for negligible."""
    op: Any = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda given, hidden: (-op(hidden, given.weight, given.tokens, reduction="none"),)


def _module(name: str, package: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Unavailable(f"package {package} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name}: {_first_line(error)}") from None


def _needs_memory(inputs: HeadInputs) -> None:
    """Ten matrices of logits: both sides, their softmax, and what the backward adds."""
    needed = 10 * 4 * len(inputs.hidden) * len(inputs.weight)
    there = available_bytes()
    if there is not None and needed > there:
        raise Unavailable(f"needs about {needed / 2**30:.0f} GiB, {there / 2**30:.0f} are free")


# Ours gathers the derivatives of both outputs in its forward, hence the fourth product.
FLOAT32 = Implementation("alignpro", BOTH, (2, 3), (2, 4), _ours, ours=True)
STORED = Implementation("alignpro, stored", BOTH, (2, 3), (2, 4), _ours_stored, ours=True)
NO_REFERENCE = Implementation(
    "alignpro, no reference", LOGPROB, (1, 2), (1, 2), _ours_logprob, ours=True
)
OURS = (FLOAT32, STORED, NO_REFERENCE)
PEERS = (
    Implementation("torch", BOTH, (2, 3), (2, 3), _torch),
    Implementation("torch.compile", BOTH, (2, 3), (2, 3), _torch_compiled, compiles=True),
    # It also runs the product for the gradient of the weight, which nobody asked for.
    Implementation("liger divergence", BOTH, (2, 3), (4, 4), _liger_divergence, compiles=True),
    Implementation("torch chunked", LOGPROB, (1, 2), (1, 2), _torch_cross_entropy),
    Implementation("liger Triton", LOGPROB, (1, 2), (1, 2), _liger_triton),
    Implementation("apple cce", LOGPROB, (1, 2), (1, 3), _apple),
)
BY_NAME = {one.name: one for one in (*OURS, *PEERS)}


def prepared(implementation: Implementation, inputs: HeadInputs) -> Compute:
    """Ready to be timed: run once forward and once with its backward.

    Raises:
        Unavailable: with the reason, whatever went wrong.
    """
    try:
        compute = implementation.prepare(inputs)
        forward(compute, inputs)
        forward_backward(compute, inputs)
    except Unavailable:
        raise
    except Exception as error:
        if implementation.ours:
            raise
        raise Unavailable(_first_line(error)) from None
    return compute


def differences(
    compute: Compute, plain: Compute, inputs: HeadInputs
) -> Iterator[tuple[str, float]]:
    """Largest differences from plain torch: of each output, and of the gradient relative to its
    largest element. Nothing for an implementation whose output is the loss itself."""
    outputs, gradient = forward_backward(compute, inputs)
    expected, expected_gradient = forward_backward(plain, inputs)
    if outputs[0].dim() == 0:
        return
    for name, one, other in zip(("logprob", "kl"), outputs, expected, strict=False):
        yield name, float((one - other).abs().max())
    if len(outputs) == len(expected):
        difference = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max()
        yield "d_hidden_relative", float(difference)


def result_bytes(inputs: HeadInputs, outputs: int, backward: bool) -> int:
    """Of what a call hands back: outputs of [T], and the gradient of the hidden states."""
    gradient = inputs.hidden.numel() if backward else 0
    return 4 * (outputs * len(inputs.tokens) + gradient)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
