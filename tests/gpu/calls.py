"""The ops of ``alignpro._testing`` on torch tensors: outputs and workspaces are torch's,
poisoned before the call, and work goes on torch's current stream."""

from __future__ import annotations

import struct
from typing import Any

import torch

from alignpro import native
from testing_extension import load_testing

cuda: Any = load_testing()
# The tests on a CPU emulate the device (tests/emulated): its tensors are the CPU's.
EMULATED = native.core.cuda.version() == "emulated"
DEVICE = "cpu" if EMULATED else "cuda"

FORWARD = ("logprob", "entropy", "kl", "reverse_kl", "reference_logprob")


def stream() -> int:
    return 0 if EMULATED else int(torch.cuda.current_stream().cuda_stream)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def workspace(size: int) -> torch.Tensor:
    return torch.full((max(size, 16),), 255, dtype=torch.uint8, device=DEVICE)


def embedding(table: torch.Tensor, tokens: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    out = poisoned(len(tokens), table.shape[1], dtype=table.dtype)
    cuda.embedding(table, tokens, scale, out, stream())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = poisoned(*x.shape, dtype=x.dtype)
    cuda.rms_norm(x, weight, eps, y, stream())
    return y


def rms_norm_add(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> torch.Tensor:
    y = residual.clone()
    cuda.rms_norm_add(x, weight, eps, y, y, stream())
    return y


def glu(gate_up: torch.Tensor, name: str = "swiglu") -> torch.Tensor:
    """name: swiglu or geglu."""
    h = poisoned(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype)
    getattr(cuda, name)(gate_up, h, stream())
    return h


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """lora: A [rank, in], B [out, rank], scale."""
    out = poisoned(len(x), len(weight), dtype=x.dtype)
    lora_x, lora_up, scale = None, None, 0.0
    if lora is not None:
        lora_x, lora_up, scale = linear(x, lora[0]), lora[1], lora[2]
    cuda.linear(x, weight, bias, residual, lora_x, lora_up, scale, out, stream())
    return out


def attention_shape(
    num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int = 0
) -> Any:
    return cuda.AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        scale=head_dim**-0.5,
    )


def qk_norm(
    qkv: torch.Tensor, shape: Any, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float
) -> None:
    """In place."""
    cuda.qk_norm(qkv, shape, q_weight, k_weight, eps, stream())


def rope_kv_write(
    qkv: torch.Tensor,
    shape: Any,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    kv: torch.Tensor,
) -> None:
    """In place: the q heads of ``qkv``, and ``kv`` [blocks, kv heads, 2, 16, head_dim]."""
    cuda.rope_kv_write(qkv, shape, cos, sin, positions, blocks, kv, stream())


class AttentionDecode:
    """Keeps output and workspace between calls."""

    def __init__(
        self, shape: Any, rows: int, q_size: int, max_positions: int, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self.max_positions = max_positions
        self.memory = workspace(cuda.attention_decode_bytes(shape, rows, max_positions))
        self.out = poisoned(rows, q_size, dtype=dtype)

    def __call__(
        self, qkv: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        cuda.attention_decode(
            qkv,
            self.shape,
            positions,
            table,
            self.max_positions,
            kv,
            self.memory,
            self.out,
            stream(),
        )
        return self.out


def attention_prefill(
    qkv: torch.Tensor,
    shape: Any,
    segments: torch.Tensor,
    max_rows: int,
    table: torch.Tensor,
    kv: torch.Tensor,
    num_heads: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """segments: (row_begin, row_count, position) each, int32 [segments, 3]. The output and the
    logarithms of the softmaxes' sums [rows, num_heads]."""
    out = poisoned(len(qkv), num_heads * head_dim, dtype=qkv.dtype)
    lse = poisoned(len(qkv), num_heads)
    cuda.attention_prefill(qkv, shape, segments, max_rows, table, kv, out, lse, stream())
    return out, lse


def linear_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    lora: tuple[torch.Tensor, torch.Tensor, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and d_low; lora: A [rank, in], B [out, rank], scale."""
    dx = poisoned(*residual.shape, dtype=dy.dtype)
    d_low = poisoned(len(dy), len(lora[0]), dtype=dy.dtype)
    cuda.linear_backward(dy, weight, residual, *lora, d_low, dx, stream())
    return dx, d_low


def lora_backward(
    x: torch.Tensor, lora_x: torch.Tensor, dy: torch.Tensor, d_low: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rank, inputs, outputs = d_low.shape[1], x.shape[1], dy.shape[1]
    d_a, d_b = poisoned(rank, inputs), poisoned(outputs, rank)
    memory = workspace(cuda.lora_backward_bytes(len(x), inputs, outputs, rank))
    cuda.lora_backward(x, lora_x, dy, d_low, scale, d_a, d_b, memory, stream())
    return d_a, d_b


class LinearLogprob:
    """Forward and backward over one set of inputs; keeps outputs and workspaces between calls."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float = 1.0,
        reference_hidden: torch.Tensor | None = None,
        reference_weight: torch.Tensor | None = None,
    ) -> None:
        self.inputs = (hidden, weight, tokens, temperature, reference_hidden, reference_weight)
        rows, vocab = len(hidden), len(weight)
        names = FORWARD if reference_hidden is not None else FORWARD[:2]
        self.forward_out = {name: poisoned(rows) for name in names}
        self.forward_out["lse"] = poisoned(rows, dtype=torch.float64)
        if reference_hidden is not None:
            self.forward_out["reference_lse"] = poisoned(rows, dtype=torch.float64)
        self.memory = workspace(cuda.linear_logprob_bytes(rows, vocab))
        self.backward_memory: torch.Tensor | None = None

    def forward(self) -> dict[str, torch.Tensor]:
        cuda.linear_logprob(*self.inputs, self.forward_out, self.memory, stream())
        return self.forward_out

    def total_variation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """TV(p, q) and the mass of p where p > q, after forward."""
        rows, vocab = len(self.inputs[0]), len(self.inputs[1])
        tv, above = poisoned(rows), poisoned(rows)
        memory = workspace(cuda.total_variation_bytes(rows, vocab))
        cuda.total_variation(*self.inputs, self.forward_out, tv, above, memory, stream())
        return tv, above

    def backward(
        self, upstream: dict[str, torch.Tensor], want_weight: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, weight = self.inputs[0], self.inputs[1]
        if self.backward_memory is None:
            size = cuda.linear_logprob_backward_bytes(
                len(hidden), len(weight), hidden.dtype == torch.bfloat16
            )
            self.backward_memory = workspace(size)
            self.d_hidden = poisoned(*hidden.shape)
            self.d_weight = poisoned(*weight.shape) if want_weight else None
        cuda.linear_logprob_backward(
            *self.inputs,
            self.forward_out,
            upstream,
            self.d_hidden,
            self.d_weight,
            self.backward_memory,
            stream(),
        )
        return self.d_hidden, self.d_weight


def sample_rows(
    rows: list[tuple[float, float]],
    truncated: list[tuple[int, float, float, int, int]] | None = None,
) -> torch.Tensor:
    """(uniform, temperature) of each row, and (top_k, top_p, min_p, ban_begin, ban_count), as the
    engine's bytes."""
    limits = truncated or [(0, 1.0, 0.0, 0, 0)] * len(rows)
    packed = b"".join(
        struct.pack("<fiffdii", temperature, *limit[:3], uniform, *limit[3:])
        for (uniform, temperature), limit in zip(rows, limits, strict=True)
    )
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).reshape(-1, 32).to(DEVICE)


def head_sample(
    hidden: torch.Tensor, head: torch.Tensor, rows: torch.Tensor, banned: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, log-probabilities and, where banned is given, the mass that truncation kept."""
    tokens = torch.full((len(hidden),), -7, dtype=torch.int32, device=DEVICE)
    logprobs = poisoned(len(hidden))
    kept = None if banned is None else poisoned(len(hidden))
    memory = workspace(cuda.head_sample_bytes(len(hidden), len(head), kept is not None))
    cuda.head_sample(hidden, head, rows, tokens, logprobs, banned, kept, memory, stream())
    return tokens, logprobs, kept
