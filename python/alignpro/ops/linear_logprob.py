"""The vocabulary projection fused with what reads it: log-probability, entropy and divergences of
each token from its hidden state, without logits. Forward and backward are the engine's C++.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from alignpro.native import core

Floats = NDArray[np.float32]
_OUTPUTS = ("logprob", "entropy", "kl", "reverse_kl", "reference_logprob")
_VARIATION = ("total_variation",)


class QuantizedWeight:
    """A matrix [rows, cols] of a GGUF file as it stands there: memory mapped, quantised or not,
    widened tile by tile where it is used. Exact in value, and never trained."""

    def __init__(self, handle: core.QuantizedWeight) -> None:
        self._handle = handle
        self.rows: int = handle.rows
        self.cols: int = handle.cols
        self.dtype: str = handle.dtype  # "F32", "Q4_1", ...: the name in the file
        self.nbytes: int = handle.nbytes

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], name: str) -> QuantizedWeight:
        """The tensor ``name`` ("output.weight"; "token_embd.weight" where the head is tied).

        Raises:
            ModelFileError: the file (a ValueError). ValueError: no such tensor, or no matrix.
        """
        return cls(core.QuantizedWeight.from_gguf(os.fspath(path), name))

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.dtype}, rows={self.rows}, cols={self.cols})"


@dataclass(frozen=True, eq=False)
class LinearLogprob:
    """What `linear_logprob` computes: float32, the shape of ``tokens``, nats.

    With p the policy's distribution over the vocabulary and q the reference's:
    """

    logprob: torch.Tensor  # log p(token)
    entropy: torch.Tensor  # -sum p log p
    kl: torch.Tensor | None  # KL(p || q), exact; None without a reference, like the rest
    reverse_kl: torch.Tensor | None  # KL(q || p), exact
    reference_logprob: torch.Tensor | None  # log q(token); a constant
    _variation: Any = field(repr=False)

    @functools.cached_property
    def total_variation(self) -> torch.Tensor:
        """TV(p, q) = sum max(0, p - q), differentiable like the others.

        A pass of its own over the vocabulary, made when it is first asked for: it can start only
        when the normalisers of both sides are known.

        Raises:
            ValueError: there is no reference.
        """
        if self._variation is None:
            raise ValueError("total_variation: expected a reference; pass reference_hidden")
        tv: torch.Tensor = self._variation()
        return tv


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | QuantizedWeight | None = None,
) -> LinearLogprob:
    """Log-probability, entropy and divergences of ``softmax(hidden @ weight.T / temperature)``.

    Equal to ``log_softmax`` of the logits, gathered at ``tokens``, with its entropy and its exact
    divergences from ``softmax(reference_hidden @ reference_weight.T / temperature)``; but the
    logits are never stored. Arithmetic is float32 with sums over the vocabulary in float64; a
    row's bits depend on nothing but the row. Every output but ``reference_logprob`` has exact
    gradients to ``hidden``, and to ``weight`` if it requires them; the reference is a constant.

    Memory beside inputs and outputs, at most `peak_bytes`: with T tokens, V rows of ``weight``, D
    columns, W threads, S = 1, or 2 with a reference, in bytes

    * without gradients, 4 R S (D + 256 W) + 28 R V / 256 + small, R = min(T, 288) rows at a time;
    * with gradients to ``hidden``, 4 T D S that are kept for the backward, and for each thread
      96 (8 D S + 2048 S + 28 V / 256) + small; 1024 D more where ``weight`` is not float32.

    A gradient to ``weight`` adds that gradient. Nothing grows with T x V.

    Args:
        hidden: [..., D], float32, bfloat16 or float16, on the CPU.
        weight: [V, D], likewise and read as it stands, or a `QuantizedWeight`.
        tokens: [...], any integer type, ids in [0, V).
        temperature: what logits are divided by; above 0.
        reference_hidden: [..., D'] of the same tokens under the reference.
        reference_weight: [V, D']; None: ``weight`` serves both.

    Source: MATH "linear_logprob"; derivatives by the logit z_v are 1[v = token] - p_v,
    -p_v (log p_v + H), p_v (log p_v - log q_v - KL), p_v - q_v and p_v (1[p_v > q_v] - sum of p
    where p > q). A KL is inf where its first side has mass that the second has not.

    Raises:
        ValueError: a dtype, device, shape, token or temperature that does not fit, by name.
        NumericError: NaN or +inf among the logits, or a row of -inf alone; it names the row.
    """
    call = _Call(hidden, weight, tokens, temperature, reference_hidden, reference_weight)
    weight_input = weight if isinstance(weight, torch.Tensor) else None
    apply = functools.partial(_Op.apply, call, hidden, weight_input)
    values = dict(zip(_OUTPUTS, apply(_OUTPUTS), strict=True))
    variation = None
    if reference_hidden is not None:
        variation = lambda: apply(_VARIATION)[0]  # noqa: E731
    return LinearLogprob(**values, _variation=variation)


def peak_bytes(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: str = "F32",
    reference: bool = False,
    gradient: bool = False,
) -> int:
    """What `linear_logprob` allocates at most beside inputs and outputs, in bytes, on the threads
    that are set now. dtype: of ``weight``, as `QuantizedWeight.dtype`. gradient: to ``hidden``."""
    return core.linear_logprob_bytes(
        num_tokens, hidden_size, vocab_size, dtype, reference, gradient
    )


def get_num_threads() -> int:
    """Threads of these ops; at first the container's CPU quota."""
    return core.ops_threads()


def set_num_threads(threads: int) -> None:
    """Run these ops on so many threads from now on. No result depends on it."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads: expected an integer of 1 or more, got {threads!r}")
    core.set_ops_threads(threads)


class _Call:
    """The arguments as the kernel takes them, and what its forward leaves for the backward."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        tokens: torch.Tensor,
        temperature: float,
        reference_hidden: torch.Tensor | None,
        reference_weight: torch.Tensor | QuantizedWeight | None,
    ) -> None:
        _check_tensor("tokens", tokens)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
        self.shape = tokens.shape
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= 2**31):
            wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise ValueError(f"tokens: expected ids of the vocabulary, got {wrong}")
        if reference_hidden is None and reference_weight is not None:
            raise ValueError(
                "reference_weight: given without reference_hidden; pass both or neither"
            )
        self.arguments = (
            _rows("hidden", hidden, self.shape),
            _weight("weight", weight),
            tokens.detach().reshape(-1).to(torch.int32).contiguous().numpy(),
            float(temperature),
            None
            if reference_hidden is None
            else _rows("reference_hidden", reference_hidden, self.shape),
            None if reference_weight is None else _weight("reference_weight", reference_weight),
        )
        self.saved: dict[str, Floats | None] = {}


class _Op(torch.autograd.Function):
    """Outputs by name: those of the first pass, or the total variation, which needs that one."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        names: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.names, ctx.mass_above = call, names, None
        # Saved so that autograd notices when one is overwritten before the backward reads it.
        ctx.save_for_backward(hidden, weight)
        if names is _OUTPUTS:
            found = call.saved = core.linear_logprob(*call.arguments, ctx.needs_input_grad[1])
        else:
            variation, ctx.mass_above = core.total_variation(*call.arguments, call.saved)
            found = {names[0]: variation}
        outputs = tuple(
            None if value is None else torch.from_numpy(value.reshape(call.shape))
            for value in (found[name] for name in names)
        )
        ctx.mark_non_differentiable(*(o for o in outputs[4:] if o is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors  # raises when one was overwritten
        _, wants_hidden, wants_weight, _ = ctx.needs_input_grad
        call: _Call = ctx.call
        d_hidden, d_weight = core.linear_logprob_backward(
            *call.arguments,
            call.saved,
            ctx.mass_above,
            {n: _flat(g) for n, g in zip(ctx.names[:4], upstream, strict=False)},
            wants_hidden,
            wants_weight,
        )
        gradients = ((d_hidden, hidden), (d_weight, weight))
        return (
            None,
            *(None if d is None else torch.from_numpy(d).view_as(of).to(of) for d, of in gradients),
            None,
        )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a torch tensor, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got {value.device}")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check_floats(name: str, value: Any) -> None:
    _check_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {value.dtype}")


def _rows(name: str, value: torch.Tensor, leading: torch.Size) -> Floats:
    """[..., D] as contiguous float32 [T, D]."""
    _check_floats(name, value)
    if value.dim() < 1 or value.shape[:-1] != leading:
        raise ValueError(
            f"{name}: expected shape [{', '.join(map(str, leading))}{', ' if leading else ''}D] to "
            f"fit tokens, got {tuple(value.shape)}"
        )
    flat = value.detach().reshape(leading.numel(), value.shape[-1])
    array: Floats = flat.to(torch.float32).contiguous().numpy()
    return array


def _weight(name: str, value: torch.Tensor | QuantizedWeight) -> Any:
    """The memory as it stands; a strided tensor is copied."""
    if isinstance(value, QuantizedWeight):
        return value._handle
    _check_floats(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape [V, D], got {tuple(value.shape)}")
    matrix = value.detach().contiguous()
    if matrix.dtype == torch.bfloat16:  # which numpy does not have
        return matrix.view(torch.uint16).numpy()
    return matrix.numpy()


def _flat(gradient: torch.Tensor | None) -> Floats | None:
    """A contiguous float32 copy: torch hands over expanded and strided gradients as well."""
    if gradient is None:
        return None
    array: Floats = gradient.detach().to(torch.float32).reshape(-1).contiguous().numpy()
    return array
