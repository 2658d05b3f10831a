"""Times the ops on the GPU beside torch: ``python -m gpu.bench OUT.json OUT.md [OP ...]``.

Inputs are random and larger than L2; the limits (matrix rate, read bandwidth) are measured in the
same run. With the names of some ops these alone are timed, without peers that are the same each
time, and join an OUT.json that is there: so ALIGNPRO_TEST_PRODUCTS, which a process reads once, has
its choices in one table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignpro import native
from gpu import calls
from gpu.calls import DEVICE
from gpu.cases import normal, sizes
from gpu.logprob_peers import bench_logprob
from gpu.model_bench import bench_gradient, bench_model
from gpu.rollout_bench import bench_rollout
from gpu.timing import Row, limits, milliseconds, row

BF16 = torch.bfloat16
HEADS = sizes((32, 8, 128), (4, 2, 16))
# What multiplies bfloat16 matrices in the ops that have a choice (csrc/cuda/products.h).
PRODUCTS = os.environ.get("ALIGNPRO_TEST_PRODUCTS") or "mma"


def bench_sample(limit: dict[str, float], rows: int, cols: int, vocab: int) -> list[Row]:
    h, w = normal(rows, cols, dtype=BF16), normal(vocab, cols, dtype=BF16, scale=cols**-0.5)
    draws = calls.sample_rows([(u, 0.8) for u in torch.rand(rows).tolist()])
    ours = milliseconds(lambda: calls.head_sample(h, w, draws))
    plain = milliseconds(lambda: torch.softmax((h @ w.T).float() / 0.8, 1).multinomial(1))
    share = 2 * vocab * cols / ours / 1e6 / limit["read_gbps"]
    work = f"{rows} x {cols} x {vocab} bf16"
    return [row("head_sample", work, ours, plain, share_of_bandwidth=share)]


def bench_attention(limit: dict[str, float], rows: int, context: int) -> list[Row]:
    heads, kv_heads, d = HEADS
    shape = calls.attention_shape(heads, kv_heads, d)
    blocks = context // 16
    kv = normal(rows * blocks, kv_heads, 2, 16, d, dtype=BF16)
    order = torch.randperm(rows * blocks, device=DEVICE, dtype=torch.int32)
    table = order.reshape(rows, blocks)
    qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=BF16)
    positions = torch.full((rows,), context - 1, dtype=torch.int32, device=DEVICE)
    op = calls.AttentionDecode(shape, rows, heads * d, context, BF16)
    ours = milliseconds(lambda: op(qkv, positions, table, kv))
    k, v = (normal(rows, kv_heads, context, d, dtype=BF16) for _ in range(2))
    q = qkv[:, : heads * d].reshape(rows, heads, 1, d)
    plain = milliseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    share = 2 * k.numel() * 2 / ours / 1e6 / limit["read_gbps"]
    work = f"{rows} sequences, context {context}, {heads}/{kv_heads} heads of {d}, bf16, a layer"
    return [row("attention_decode", work, ours, plain, share_of_bandwidth=share)]


def whole_segments(sequences: int, length: int) -> torch.Tensor:
    rows = [[s * length, length, 0] for s in range(sequences)]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def bench_prefill(limit: dict[str, float], sequences: int, length: int) -> list[Row]:
    heads, kv_heads, d = HEADS
    shape = calls.attention_shape(heads, kv_heads, d)
    rows, blocks = sequences * length, length // 16
    kv = normal(sequences * blocks, kv_heads, 2, 16, d, dtype=BF16)
    table = torch.randperm(len(kv), device=DEVICE, dtype=torch.int32).reshape(sequences, blocks)
    qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=BF16)
    segments = whole_segments(sequences, length)
    ours = milliseconds(
        lambda: calls.attention_prefill(qkv, shape, segments, length, table, kv, heads, d)
    )
    q = normal(sequences, heads, length, d, dtype=BF16)
    k, v = (normal(sequences, kv_heads, length, d, dtype=BF16) for _ in range(2))
    plain = milliseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    )
    share = 2.0 * rows * length * heads * d / ours / 1e9 / limit["matrix_tflops"]  # causal half
    work = f"{sequences} x {length} positions, {heads}/{kv_heads} heads of {d}, bf16, a layer"
    return [row("attention_prefill", work, ours, plain, share_of_matrix_rate=share)]


def bench_linear(limit: dict[str, float], rows: int, cols: int, n: int) -> list[Row]:
    x, w = normal(rows, cols, dtype=BF16), normal(n, cols, dtype=BF16, scale=cols**-0.5)
    out, none = torch.empty(rows, n, dtype=BF16, device=DEVICE), None
    ours = milliseconds(
        lambda: calls.cuda.linear(x, w, none, none, none, none, 0.0, out, calls.stream())
    )
    plain = milliseconds(lambda: x @ w.T)
    share = 2.0 * rows * cols * n / ours / 1e9 / limit["matrix_tflops"]
    read = 2.0 * cols * n / ours / 1e6 / limit["read_gbps"]  # the weight
    work = f"{rows} x {cols} x {n} bf16"
    shares = {"share_of_matrix_rate": share, "share_of_bandwidth": read}
    return [row("linear", work, ours, plain, **shares)]


def bench_gradients(limit: dict[str, float], rows: int, cols: int, n: int) -> list[Row]:
    """Of a linear layer and its adapter of rank 16: dx, then dA and dB."""
    dy, w = normal(rows, n, dtype=BF16), normal(n, cols, dtype=BF16, scale=n**-0.5)
    a, b, x = (
        normal(16, cols, dtype=BF16),
        normal(n, 16, dtype=BF16),
        normal(rows, cols, dtype=BF16),
    )
    low, lora = calls.linear(x, a), (a, b, 0.5)
    _, d_low = calls.linear_backward(dy, w, x, lora)
    work = f"{rows} x {cols} x {n} bf16, rank 16"
    ours = milliseconds(lambda: calls.linear_backward(dy, w, x, lora))
    plain = milliseconds(lambda: dy @ w + (0.5 * dy @ b) @ a + x)
    share = 2.0 * rows * cols * n / ours / 1e9 / limit["matrix_tflops"]
    sums = milliseconds(lambda: calls.lora_backward(x, low, dy, d_low, 0.5))
    plain_sums = milliseconds(lambda: (d_low.T @ x, dy.T @ low))
    read = 2.0 * rows * (cols + n) / sums / 1e6 / limit["read_gbps"]
    return [
        row("linear_backward", work, ours, plain, share_of_matrix_rate=share),
        row("lora_backward", work, sums, plain_sums, share_of_bandwidth=read),
    ]


def bench_attention_backward(limit: dict[str, float], sequences: int, length: int) -> list[Row]:
    heads, kv_heads, d = HEADS
    shape = calls.attention_shape(heads, kv_heads, d)
    rows, blocks = sequences * length, length // 16
    kv = normal(sequences * blocks, kv_heads, 2, 16, d, dtype=BF16)
    table = torch.arange(len(kv), device=DEVICE, dtype=torch.int32).reshape(sequences, blocks)
    qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=BF16)
    dout = normal(rows, heads * d, dtype=BF16)
    segments = whole_segments(sequences, length)
    out, lse = calls.attention_prefill(qkv, shape, segments, length, table, kv, heads, d)
    d_qkv, memory = (
        torch.empty_like(qkv),
        calls.workspace(calls.cuda.attention_backward_bytes(shape, rows)),
    )
    ours = milliseconds(
        lambda: calls.cuda.attention_backward(
            qkv, shape, out, dout, lse, segments, length, None, None, table, kv, d_qkv, memory,
            calls.stream(),
        )
    )  # fmt: skip
    share = 5.0 * rows * length * heads * d / ours / 1e9 / limit["matrix_tflops"]  # of 5 products
    work = f"{sequences} x {length} positions, {heads}/{kv_heads} heads of {d}, bf16, a layer"
    return [row("attention_backward", work, ours, None, share_of_matrix_rate=share)]


def bench_rows(limit: dict[str, float], rows: int, cols: int, inner: int) -> list[Row]:
    x, weight = normal(rows, cols, dtype=BF16), normal(cols, dtype=BF16)
    gate_up, h = normal(rows, 2 * inner, dtype=BF16), normal(rows, inner, dtype=BF16)
    y = torch.empty_like(x)

    def plain_swiglu() -> torch.Tensor:
        a, b = gate_up.chunk(2, dim=1)
        return torch.nn.functional.silu(a) * b

    norm = milliseconds(lambda: calls.cuda.rms_norm(x, weight, 1e-5, y, calls.stream()))
    plain_norm = milliseconds(lambda: torch.nn.functional.rms_norm(x, (cols,), weight, 1e-5))
    gate = milliseconds(lambda: calls.cuda.swiglu(gate_up, h, calls.stream()))
    plain_gate = milliseconds(plain_swiglu)
    of = limit["read_gbps"] * 1e6
    shares = (x.numel() * 4 / norm / of, h.numel() * 6 / gate / of)
    return [
        row("rms_norm", f"{rows} x {cols} bf16", norm, plain_norm, share_of_bandwidth=shares[0]),
        row("swiglu", f"{rows} x {inner} bf16", gate, plain_gate, share_of_bandwidth=shares[1]),
    ]


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    limit = report["limits"]
    lines = [
        f"{report['device']}, torch {report['torch']}; matrix rate "
        f"{limit['matrix_tflops']:.0f} TFLOP/s, read bandwidth {limit['read_gbps']:.0f} GB/s",
        "",
        "| op | work | products | ours, ms | torch, ms | shares |",
        "|---|---|---|---:|---:|---|",
    ]
    known = ("op", "work", "products", "ours_ms", "torch_ms")
    for r in rows:
        shares = ", ".join(f"{k} {v:.3g}" for k, v in r.items() if k not in known)
        torchs = "" if r["torch_ms"] is None else f"{r['torch_ms']:.3f}"
        lines.append(
            f"| {r['op']} | {r['work']} | {r['products']} | {r['ours_ms']:.3f} | {torchs} "
            f"| {shares} |"
        )
    return "\n".join(lines) + "\n"


def benches(
    limit: dict[str, float], scratch: Path, peers: bool
) -> list[tuple[str, Callable[[], list[Row]]]]:
    """Of each the op that it is asked for by."""
    return [
        ("rms_norm", lambda: bench_rows(limit, *sizes((16384, 4096, 8192), (3, 64, 96)))),
        ("linear", lambda: bench_linear(limit, *sizes((8192, 4096, 4096), (5, 64, 72)))),
        # A decode step of Llama-3.1-8B: qkv, o, gate_up, down.
        *(
            ("linear", partial(bench_linear, limit, *sizes((n, *of), (n // 20 + 1, 64, 72))))
            for n in (1, 64)
            for of in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
        ),
        ("attention_decode", lambda: bench_attention(limit, *sizes((64, 1024), (2, 32)))),
        ("attention_decode", lambda: bench_attention(limit, *sizes((1, 8192), (1, 32)))),
        ("attention_prefill", lambda: bench_prefill(limit, *sizes((8, 2048), (2, 16)))),
        (
            "linear_backward",
            lambda: bench_gradients(limit, *sizes((8192, 4096, 4096), (5, 64, 72))),
        ),
        ("attention_backward", lambda: bench_attention_backward(limit, *sizes((8, 1024), (2, 16)))),
        ("head_sample", lambda: bench_sample(limit, *sizes((64, 4096, 131072), (3, 64, 300)))),
        ("linear_logprob", lambda: bench_logprob(limit, peers)),
        ("decode", lambda: bench_model(limit, scratch, peers)),
        ("rollout", lambda: bench_rollout(limit, scratch)),
        ("gradient", lambda: bench_gradient(limit, scratch)),
    ]


def main(out: str, table: str, *ops: str) -> int:
    torch.manual_seed(0)
    failed = 0
    if ops and Path(out).exists():
        report: dict[str, Any] = json.loads(Path(out).read_text(encoding="utf-8"))
    else:
        report = {
            "device": native.core.cuda.device_name(),
            "torch": torch.__version__,
            "limits": limits(),
            "rows": [],
        }
    rows: list[Row] = report["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        for op, bench in benches(report["limits"], Path(scratch), peers=not ops):
            if ops and op not in ops:
                continue
            try:
                rows += [{"products": PRODUCTS, **timed} for timed in bench()]
            except Exception:  # the others still tell something
                traceback.print_exc()
                failed = 1
            torch.cuda.empty_cache()
            Path(out).write_text(json.dumps(report, indent=1), encoding="utf-8")
            Path(table).write_text(markdown(report, rows), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
