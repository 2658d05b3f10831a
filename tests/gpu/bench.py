"""Times the ops on the GPU beside torch: ``python -m gpu.bench OUT.json OUT.md [OP ...]``.

CUDA events around single calls, the L2 cache overwritten before each, medians; inputs are random
and larger than L2. The limits (matrix rate, read bandwidth) are measured here too. With the names
of some ops these alone are timed, and join an OUT.json that is there: so ALIGNPRO_CUDA_PRODUCTS,
which a process reads once, has its choices in one table.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gpu import calls
from gpu.cases import normal
from gpu.model_bench import bench_decode

Row = dict[str, object]
BF16 = torch.bfloat16
# What multiplies bfloat16 matrices in the ops that have a choice (csrc/cuda/products.h).
PRODUCTS = os.environ.get("ALIGNPRO_CUDA_PRODUCTS") or "mma"


def milliseconds(function: Callable[[], object], repeats: int = 15) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def limits() -> dict[str, float]:
    a, b = normal(8192, 8192, dtype=BF16), normal(8192, 8192, dtype=BF16)
    big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    words = big.view(torch.int64)
    return {
        "matrix_tflops": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9,
        "read_gbps": big.numel() / milliseconds(lambda: words.sum()) / 1e6,
    }


def row(op: str, work: str, ours: float, torchs: float | None, **shares: float) -> Row:
    return {"op": op, "work": work, "ours_ms": ours, "torch_ms": torchs, **shares}


def torch_logprob(
    h: torch.Tensor, w: torch.Tensor, tokens: torch.Tensor, ref: torch.Tensor, rows: int = 1024
) -> list[torch.Tensor]:
    """Log-probability, entropy and KL by chunks of rows, as plain torch can do it."""
    out = []
    for at in range(0, len(h), rows):
        logp = torch.log_softmax((h[at : at + rows] @ w.T).float(), dim=1)
        logq = torch.log_softmax((ref[at : at + rows] @ w.T).float(), dim=1)
        p = logp.exp()
        chosen = logp.gather(1, tokens[at : at + rows].long()[:, None])[:, 0]
        out.append(torch.stack((chosen, -(p * logp).sum(1), (p * (logp - logq)).sum(1))))
    return out


def bench_logprob(limit: dict[str, float], rows: int, cols: int, vocab: int) -> list[Row]:
    h, ref = normal(rows, cols, dtype=BF16), normal(rows, cols, dtype=BF16)
    w = normal(vocab, cols, dtype=BF16, scale=cols**-0.5)
    tokens = torch.randint(0, vocab, (rows,), dtype=torch.int32, device="cuda")
    op = calls.LinearLogprob(h, w, tokens, 1.0, ref)
    upstream = {name: normal(rows) for name in ("logprob", "entropy", "kl")}
    forward = milliseconds(op.forward, 7)
    backward = milliseconds(lambda: op.backward(upstream, want_weight=False), 5)
    plain = milliseconds(lambda: torch_logprob(h, w, tokens, ref), 3)
    flops = 2.0 * rows * cols * vocab
    work = f"{rows} x {cols} x {vocab} bf16, with KL"
    return [
        row(
            "linear_logprob",
            work,
            forward,
            plain,
            share_of_matrix_rate=2 * flops / forward / 1e9 / limit["matrix_tflops"],
            workspace_mb=op.memory.numel() / 1e6,
        ),
        row(
            "linear_logprob_backward",
            f"{work}, d_hidden",
            backward,
            None,
            share_of_matrix_rate=3 * flops / backward / 1e9 / limit["matrix_tflops"],
        ),
    ]


def bench_sample(limit: dict[str, float], rows: int, cols: int, vocab: int) -> list[Row]:
    h, w = normal(rows, cols, dtype=BF16), normal(vocab, cols, dtype=BF16, scale=cols**-0.5)
    draws = calls.sample_rows([(u, 0.8) for u in torch.rand(rows).tolist()])
    ours = milliseconds(lambda: calls.head_sample(h, w, draws))
    plain = milliseconds(lambda: torch.softmax((h @ w.T).float() / 0.8, 1).multinomial(1))
    share = 2 * vocab * cols / ours / 1e6 / limit["read_gbps"]
    work = f"{rows} x {cols} x {vocab} bf16"
    return [row("head_sample", work, ours, plain, share_of_bandwidth=share)]


def bench_attention(limit: dict[str, float], rows: int, context: int) -> list[Row]:
    heads, kv_heads, d = 32, 8, 128
    shape = calls.attention_shape(heads, kv_heads, d)
    blocks = context // 16
    kv = normal(rows * blocks, kv_heads, 2, 16, d, dtype=BF16)
    order = torch.randperm(rows * blocks, device="cuda", dtype=torch.int32)
    table = order.reshape(rows, blocks)
    qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=BF16)
    positions = torch.full((rows,), context - 1, dtype=torch.int32, device="cuda")
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
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def bench_prefill(limit: dict[str, float], sequences: int, length: int) -> list[Row]:
    heads, kv_heads, d = 32, 8, 128
    shape = calls.attention_shape(heads, kv_heads, d)
    rows, blocks = sequences * length, length // 16
    kv = normal(sequences * blocks, kv_heads, 2, 16, d, dtype=BF16)
    table = torch.randperm(len(kv), device="cuda", dtype=torch.int32).reshape(sequences, blocks)
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
    out, none = torch.empty(rows, n, dtype=BF16, device="cuda"), None
    ours = milliseconds(
        lambda: calls.cuda.linear(x, w, none, none, none, none, 0.0, out, calls.stream())
    )
    plain = milliseconds(lambda: x @ w.T)
    share = 2.0 * rows * cols * n / ours / 1e9 / limit["matrix_tflops"]
    work = f"{rows} x {cols} x {n} bf16"
    return [row("linear", work, ours, plain, share_of_matrix_rate=share)]


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
    heads, kv_heads, d = 32, 8, 128
    shape = calls.attention_shape(heads, kv_heads, d)
    rows, blocks = sequences * length, length // 16
    kv = normal(sequences * blocks, kv_heads, 2, 16, d, dtype=BF16)
    table = torch.arange(len(kv), device="cuda", dtype=torch.int32).reshape(sequences, blocks)
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


def bench_rows(limit: dict[str, float]) -> list[Row]:
    x, weight = normal(16384, 4096, dtype=BF16), normal(4096, dtype=BF16)
    gate_up = normal(16384, 2 * 8192, dtype=BF16)
    y, h = torch.empty_like(x), normal(16384, 8192, dtype=BF16)
    norm = milliseconds(lambda: calls.cuda.rms_norm(x, weight, 1e-5, y, calls.stream()))
    gate = milliseconds(lambda: calls.cuda.swiglu(gate_up, h, calls.stream()))

    def plain_swiglu() -> torch.Tensor:
        a, b = gate_up.chunk(2, dim=1)
        return torch.nn.functional.silu(a) * b

    plain_norm = milliseconds(lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5))
    of = limit["read_gbps"] * 1e6
    shares = {"rms_norm": x.numel() * 4 / norm / of, "swiglu": h.numel() * 6 / gate / of}
    plain_gate = milliseconds(plain_swiglu)
    return [
        row(
            "rms_norm", "16384 x 4096 bf16", norm, plain_norm, share_of_bandwidth=shares["rms_norm"]
        ),
        row("swiglu", "16384 x 8192 bf16", gate, plain_gate, share_of_bandwidth=shares["swiglu"]),
    ]


def markdown(report: dict[str, object], rows: list[Row]) -> str:
    limit = report["limits"]
    assert isinstance(limit, dict)
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


def main(out: str, table: str, *ops: str) -> int:
    torch.manual_seed(0)
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    rows: list[Row] = []
    if ops and Path(out).exists():
        report = json.loads(Path(out).read_text(encoding="utf-8"))
        limit, rows = report["limits"], report["rows"]  # type: ignore[assignment]
    else:
        report["limits"] = limit = limits()
    for op, bench in (
        ("rms_norm", lambda: bench_rows(limit)),
        ("linear", lambda: bench_linear(limit, 8192, 4096, 4096)),
        ("linear", lambda: bench_linear(limit, 64, 4096, 14336)),
        ("linear", lambda: bench_linear(limit, 1, 4096, 14336)),
        ("attention_decode", lambda: bench_attention(limit, 64, 1024)),
        ("attention_decode", lambda: bench_attention(limit, 1, 8192)),
        ("attention_prefill", lambda: bench_prefill(limit, 8, 2048)),
        ("linear_backward", lambda: bench_gradients(limit, 8192, 4096, 4096)),
        ("attention_backward", lambda: bench_attention_backward(limit, 8, 1024)),
        ("head_sample", lambda: bench_sample(limit, 64, 4096, 131072)),
        ("linear_logprob", lambda: bench_logprob(limit, 8192, 4096, 131072)),
        ("decode", lambda: bench_decode(limit, with_peer=not ops)),  # which is the same each time
    ):
        if ops and op not in ops:
            continue
        timed: list[Row] = [{"products": PRODUCTS, **r} for r in bench()]
        rows += timed
        print(
            *markdown({"device": "", "torch": "", "limits": limit}, timed).splitlines()[4:],
            sep="\n",
        )
        torch.cuda.empty_cache()
    report["rows"] = rows
    Path(out).write_text(json.dumps(report, indent=1), encoding="utf-8")
    Path(table).write_text(markdown(report, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
