"""The gradients among the ops, as in cases.py: against float64 autograd of plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu import calls
from gpu.calls import DEVICE
from gpu.cases import (
    DTYPES,
    Measured,
    activation,
    case,
    differing,
    error,
    ints,
    normal,
    sizes,
    turned,
)


def gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], d_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def double(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() for x in inputs]


def judged(
    name: str,
    got: torch.Tensor,
    function: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    d_out: torch.Tensor,
    which: int,
) -> Measured:
    """The gradient by inputs[which], no further from float64 than twice torch's own."""
    truth = gradients(function, double(inputs), d_out.double())[which]
    plain = gradients(function, inputs, d_out)[which]
    floor = 1e-6 if d_out.dtype == torch.float32 else 6e-3
    return [(name, error(got, truth), max(2 * error(plain, truth), floor))]


@case
def embedding_backward() -> Measured:
    """Rows of a table that are read never, once and thrice; of a soft prompt, from rounded rows."""
    measured: Measured = []
    read = [4, 0, 4, 2, 4]  # by row of d_out
    order = sorted(range(len(read)), key=lambda place: read[place])
    begins = [sum(row < r for row in read) for r in range(7)]
    for given, dtype in (*((torch.float32, of) for of in DTYPES), (torch.bfloat16, torch.float32)):
        d_out = normal(len(read), 72, dtype=given)
        got = calls.poisoned(6, 72, dtype=dtype)
        calls.cuda.embedding_backward(d_out, ints(begins), ints(order), got, calls.stream())
        truth = torch.zeros(6, 72, dtype=torch.float64, device=DEVICE)
        truth.index_add_(0, torch.tensor(read, device=DEVICE), d_out.double())
        budget = 4e-7 if dtype == torch.float32 else 4e-3
        measured.append((f"{given} {dtype}", error(got, truth), budget))
        measured.append(
            (f"{given} {dtype} unread", differing(got[1], torch.zeros_like(got[1])), 0.0)
        )
    return measured


@case
def rms_norm_backward() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        x, weight, dy = (normal(37, 576, dtype=dtype, scale=s) for s in (3.0, 1.0, 1.0))
        weight = weight[0].contiguous()

        def norm(a: torch.Tensor, w: torch.Tensor = weight) -> torch.Tensor:
            return torch.nn.functional.rms_norm(a, (576,), w.to(a.dtype), 1e-5)

        dx = torch.zeros_like(x)
        calls.cuda.rms_norm_backward(x, weight, 1e-5, dy, dx, calls.stream())
        measured += judged(str(dtype), dx, norm, [x], dy, 0)
        again = torch.ones(1, 576, dtype=dtype, device=DEVICE)
        more = again.clone()
        calls.cuda.rms_norm_backward(
            x[:1].contiguous(), weight, 1e-5, dy[:1].contiguous(), more, calls.stream()
        )
        sums = error(more, (again + dx[:1]).double())
        measured.append((f"{dtype} added", sums, 1e-6 if dtype == torch.float32 else 6e-3))
    return measured


@case
def qk_norm_backward() -> Measured:
    measured: Measured = []
    heads, kv_heads = 6, 2
    for dtype in DTYPES:
        for d in (8, 128):
            rows, width = 5, (heads + 2 * kv_heads) * d
            qkv, d_qkv = (
                normal(rows, width, dtype=dtype, scale=3.0),
                normal(rows, width, dtype=dtype),
            )
            before = d_qkv.reshape(rows, -1, d).clone()
            q_weight, k_weight = normal(d, dtype=dtype), normal(d, dtype=dtype)
            weight = torch.cat((q_weight.expand(heads, d), k_weight.expand(kv_heads, d)))
            normed = heads + kv_heads

            def norm(x: torch.Tensor, w: torch.Tensor = weight, d: int = d) -> torch.Tensor:
                return torch.nn.functional.rms_norm(x, (d,), None, 1e-5) * w.to(x.dtype)

            shape = calls.attention_shape(heads, kv_heads, d)
            calls.cuda.qk_norm_backward(qkv, shape, q_weight, k_weight, 1e-5, d_qkv, calls.stream())
            got, x = d_qkv.reshape(rows, -1, d), qkv.reshape(rows, -1, d)[:, :normed]
            measured += judged(
                f"{dtype} {d}", got[:, :normed], norm, [x], before[:, :normed].contiguous(), 0
            )
            kept = differing(got[:, normed:], before[:, normed:])
            measured.append((f"{dtype} {d} v kept", kept, 0.0))
    return measured


def glu_backward(name: str) -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        gate_up, dh = normal(37, 2 * 1536, dtype=dtype, scale=3.0), normal(37, 1536, dtype=dtype)

        def glu(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=1)
            return activation(name)(gate) * up

        d_gate_up = calls.poisoned(37, 2 * 1536, dtype=dtype)
        backward = getattr(calls.cuda, f"{name}_backward")
        backward(gate_up, dh, d_gate_up, calls.stream())
        measured += judged(str(dtype), d_gate_up, glu, [gate_up], dh, 0)
    return measured


@case
def swiglu_backward() -> Measured:
    return glu_backward("swiglu")


@case
def geglu_backward() -> Measured:
    return glu_backward("geglu")


@case
def rope_backward() -> Measured:
    measured: Measured = []
    heads, kv_heads, d, half = 6, 2, 40, 16
    for dtype in DTYPES:
        d_qkv = normal(5, (heads + 2 * kv_heads) * d, dtype=dtype)
        before = d_qkv.reshape(5, -1, d).clone()
        angle = torch.rand(50, half, device=DEVICE) * 6.3
        cos, sin, at = angle.cos(), angle.sin(), [0, 15, 16, 49, 7]
        shape = calls.attention_shape(heads, kv_heads, d)
        calls.cuda.rope_backward(d_qkv, shape, cos, sin, ints(at), calls.stream())
        got, turning = d_qkv.reshape(5, -1, d), heads + kv_heads
        truth = turned(before.double(), cos[at], -sin[at])[:, :turning]
        budget = 1e-6 if dtype == torch.float32 else 6e-3
        measured.append((f"{dtype}", error(got[:, :turning], truth), budget))
        measured.append((f"{dtype} v", differing(got[:, turning:], before[:, turning:]), 0.0))
    return measured


@case
def linear_backward() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for rows, n, k in sizes(
            ((3, 576, 1536), (130, 264, 72), (2051, 1024, 512)), ((3, 72, 136), (130, 40, 24))
        ):
            dy, w = normal(rows, n, dtype=dtype), normal(n, k, dtype=dtype, scale=n**-0.5)
            a, b = normal(16, k, dtype=dtype, scale=0.2), normal(n, 16, dtype=dtype, scale=0.2)
            x, residual = normal(rows, k, dtype=dtype), normal(rows, k, dtype=dtype)
            low = calls.linear(x, a)
            dx, d_low = calls.linear_backward(dy, w, residual, (a, b, 0.5))
            name = f"{dtype} {rows}x{n}x{k}"
            up, floor = dy.double(), 2e-6 if dtype == torch.float32 else 6e-3
            truth_low = 0.5 * up @ b.double()
            truth = up @ w.double() + truth_low @ a.double() + residual.double()
            plain = dy @ w + (0.5 * dy @ b) @ a + residual
            measured.append((f"{name} d_low", error(d_low, truth_low), floor))
            budget = max(2 * error(plain, truth), floor)
            measured.append((f"{name} dx", error(dx, truth), budget))
            d_a, d_b = calls.lora_backward(x, low, dy, d_low, 0.5)
            # From what was stored; sums are float32.
            measured.append((f"{name} d_a", error(d_a, d_low.double().T @ x.double()), 2e-5))
            measured.append((f"{name} d_b", error(d_b, 0.5 * up.T @ low.double()), 2e-5))
            again = calls.lora_backward(x, low, dy, d_low, 0.5)
            measured.append((f"{name} again", differing(again[0], d_a), 0.0))
            one = calls.linear_backward(
                dy[-1:].contiguous(), w, residual[-1:].contiguous(), (a, b, 0.5)
            )
            measured.append((f"{name} alone", differing(one[0], dx[-1:]), 0.0))
    return measured


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """q [rows, heads, d], k and v [keys, kv heads, d], mask [rows, keys]: True where seen."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("rhd,khd->hrk", q, k) * q.shape[2] ** -0.5
    p = torch.softmax(scores.masked_fill(~mask, -float("inf")), dim=2)
    return torch.einsum("hrk,khd->rhd", p, v)


@case
def attention_backward() -> Measured:
    """A prompt of 70 tokens under two continuations of 50 and 33, as one tree."""
    measured: Measured = []
    prompt, counts = 70, (50, 33)
    rows, total = prompt + sum(counts), prompt + max(counts)
    segments = [
        [0, prompt, 0],
        [prompt, counts[0], prompt],
        [prompt + counts[0], counts[1], prompt],
    ]
    position = [*range(prompt), *(prompt + i for n in counts for i in range(n))]
    branch = [0] * prompt + [1] * counts[0] + [2] * counts[1]
    for dtype in DTYPES:
        for heads, kv_heads, d, window in ((8, 2, 128, 0), (9, 3, 64, 40), (4, 4, 96, 0)):
            shape = calls.attention_shape(heads, kv_heads, d, window)
            qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=dtype)
            blocks = (total + 15) // 16
            kv = torch.zeros(3 * blocks, kv_heads, 2, 16, d, dtype=dtype, device=DEVICE)
            table = torch.arange(3 * blocks, dtype=torch.int32, device=DEVICE).reshape(3, blocks)
            split = qkv.reshape(rows, -1, d)
            for row in range(rows):
                pair = split[row, heads:].reshape(2, kv_heads, d).transpose(0, 1)
                for s in (branch[row],) if branch[row] else (0, 1, 2):
                    p = position[row]
                    kv[int(table[s, p // 16]), :, :, p % 16] = pair
            at, of = torch.tensor(position, device=DEVICE), torch.tensor(branch, device=DEVICE)
            mask = at[:, None] >= at
            if window:
                mask &= at[:, None] - at < window
            mask &= (of == of[:, None]) | (of == 0)
            packed = torch.tensor(segments, dtype=torch.int32, device=DEVICE)
            out, lse = calls.attention_prefill(qkv, shape, packed, prompt, table, kv, heads, d)
            dout = normal(rows, heads * d, dtype=dtype)
            children = (ints([0, 3, 4, 5]), ints([0, 1, 2, 1, 2]))
            memory = calls.workspace(calls.cuda.attention_backward_bytes(shape, rows))
            d_qkv = calls.poisoned(*qkv.shape, dtype=dtype)
            calls.cuda.attention_backward(
                qkv, shape, out, dout, lse, packed, prompt, *children, table, kv, d_qkv, memory,
                calls.stream(),
            )  # fmt: skip
            inputs = list(split.split([heads, kv_heads, kv_heads], dim=1))
            ends = d_qkv.reshape(rows, -1, d).split([heads, kv_heads, kv_heads], dim=1)

            def attend(
                q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor = mask
            ) -> torch.Tensor:
                return attend_rows(q, k, v, seen)

            for which, (part, got) in enumerate(zip("qkv", ends, strict=True)):
                name = f"{dtype} {heads}/{kv_heads}x{d} d{part}"
                upstream = dout.reshape(rows, heads, d)
                measured += judged(name, got, attend, inputs, upstream, which)
            again = calls.poisoned(*qkv.shape, dtype=dtype)
            calls.cuda.attention_backward(
                qkv, shape, out, dout, lse, packed, prompt, *children, table, kv, again, memory,
                calls.stream(),
            )  # fmt: skip
            measured.append((f"{dtype} {heads}/{kv_heads}x{d} again", differing(again, d_qkv), 0.0))
    return measured
