"""Every op on the GPU against float64, on fresh random inputs: a case returns its measurements as
(what, error, budget), and holds where no error is above its budget.

Budgets: twice the distance of plain torch at the same precision (or a few roundings, where torch
is exact), as a relative norm. Equalities to the bit are errors of 0.0 against a budget of 0.0.
Long because every op of a forward has its case here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gpu import calls
from gpu.calls import DEVICE, EMULATED

Measured = list[tuple[str, float, float]]
DTYPES = (torch.float32, torch.bfloat16)
CASES: list[Callable[[], Measured]] = []


def sizes(gpu: Any, emulated: Any) -> Any:
    """What a case runs with; fibers on a CPU take a hundred thousand times as long."""
    return emulated if EMULATED else gpu


def case(function: Callable[[], Measured]) -> Callable[[], Measured]:
    CASES.append(function)
    return function


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative norm; infinite where x is not finite."""
    if not bool(torch.isfinite(x).all()):
        return float("inf")
    return float((x.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def judged(what: str, x: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor) -> Measured:
    floor = 4e-7 if x.dtype == torch.float32 else 4e-3
    return [(what, error(x, truth), max(2 * error(torchs, truth), floor))]


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    """How many values differ in a bit; NaN equals itself."""
    same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    return float((~same).sum())


@case
def embedding() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        table, tokens = normal(111, 72, dtype=dtype), ints([0, 110, 5, 111, -1])
        out = calls.embedding(table, tokens)
        measured.append((f"{dtype} rows", differing(out[:3], table[tokens[:3].long()]), 0.0))
        measured.append((f"{dtype} outside", float((~out[3:].isnan()).sum()), 0.0))
        scaled = calls.embedding(table, tokens[:3], 6.875)
        expected = table[tokens[:3].long()] * torch.tensor(6.875, dtype=dtype)
        measured.append((f"{dtype} scaled", differing(scaled, expected), 0.0))
    return measured


@case
def soft_rows() -> Measured:
    """Rows named twice, once and never; a token and a row that is not there are left."""
    measured: Measured = []
    for dtype in DTYPES:
        soft, before = normal(3, 72, dtype=dtype), normal(5, 72, dtype=dtype)
        out = before.clone()
        calls.cuda.soft_rows(soft, ints([-1, 7, -3, -1, -4]), out, calls.stream())
        expected = torch.stack([soft[0], before[1], soft[2], soft[0], before[4]])
        measured.append((str(dtype), differing(out, expected), 0.0))
    return measured


@case
def mix_rows() -> Measured:
    """Sums of none, one and three rows, the last with a negative weight."""
    measured: Measured = []
    weights = torch.tensor([1.0, 0.75, 0.5, -0.25], device=DEVICE)
    for dtype in DTYPES:
        x, out = normal(4, 72, dtype=dtype), calls.poisoned(3, 72, dtype=dtype)
        calls.cuda.mix_rows(x, ints([0, 0, 1, 4]), ints([2, 0, 3, 1]), weights, out, calls.stream())
        truth = torch.stack([x[2] * 0, x[2], 0.75 * x[0].double() + 0.5 * x[3] - 0.25 * x[1]])
        rounded = truth.double().float().to(dtype)
        measured.append((str(dtype), differing(out, rounded), 0.0))
    return measured


@case
def rms_norm() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for rows, cols in sizes(((1, 8), (37, 576), (5, 4096)), ((1, 8), (3, 576))):
            x, weight = normal(rows, cols, dtype=dtype, scale=3.0), normal(cols, dtype=dtype)
            truth = torch.nn.functional.rms_norm(x.double(), (cols,), weight.double(), 1e-5)
            plain = torch.nn.functional.rms_norm(x, (cols,), weight, 1e-5)
            y = calls.rms_norm(x, weight, 1e-5)
            measured += judged(f"{dtype} {rows}x{cols}", y, plain, truth)
            alone = calls.rms_norm(x[-1:].contiguous(), weight, 1e-5)
            measured.append((f"{dtype} {rows}x{cols} alone", differing(alone, y[-1:]), 0.0))
    return measured


@case
def rms_norm_add() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        x, residual = normal(5, 576, dtype=dtype, scale=3.0), normal(5, 576, dtype=dtype)
        weight = normal(576, dtype=dtype)
        truth = torch.nn.functional.rms_norm(x.double(), (576,), weight.double(), 1e-5)
        plain = torch.nn.functional.rms_norm(x, (576,), weight, 1e-5)
        y = calls.rms_norm_add(x, weight, 1e-5, residual)
        measured += judged(str(dtype), y, plain + residual, truth + residual.double())
    return measured


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the gate: swiglu's or geglu's."""
    if name == "swiglu":
        return torch.nn.functional.silu
    return functools.partial(torch.nn.functional.gelu, approximate="tanh")


def glu(name: str) -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        gate_up = normal(*sizes((37, 2 * 1536), (3, 2 * 136)), dtype=dtype, scale=3.0)
        gate, up = gate_up.double().chunk(2, dim=1)
        plain_gate, plain_up = gate_up.chunk(2, dim=1)
        measured += judged(
            str(dtype),
            calls.glu(gate_up, name),
            activation(name)(plain_gate) * plain_up,
            activation(name)(gate) * up,
        )
    return measured


@case
def swiglu() -> Measured:
    return glu("swiglu")


@case
def geglu() -> Measured:
    return glu("geglu")


@case
def linear() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for rows, n, k in sizes(
            ((1, 576, 1536), (130, 264, 72), (517, 1024, 4096), (2048, 1024, 512)),
            ((1, 136, 48), (130, 8, 72)),
        ):
            x, w = normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5)
            a, b = normal(16, k, dtype=dtype, scale=k**-0.5), normal(n, 16, dtype=dtype)
            bias, residual = normal(n, dtype=dtype), normal(rows, n, dtype=dtype)
            name = f"{dtype} {rows}x{n}x{k}"
            measured += judged(name, calls.linear(x, w), x @ w.T, x.double() @ w.double().T)
            y = calls.linear(x, w, bias, residual, (a, b, 0.5))
            truth = x.double() @ w.double().T + 0.5 * x.double() @ a.double().T @ b.double().T
            plain = x @ w.T + 0.5 * ((x @ a.T) @ b.T) + bias + residual
            measured += judged(f"{name} lora", y, plain, truth + bias.double() + residual.double())
            for few in (1, 40):  # by other tiles, the same bits
                some = calls.linear(x[-few:], w, bias, residual[-few:], (a, b, 0.5))
                measured.append((f"{name} last {few}", differing(some, y[-few:]), 0.0))
    return measured


@case
def qk_norm() -> Measured:
    measured: Measured = []
    heads, kv_heads = 6, 2
    for dtype in DTYPES:
        for d in (8, 128):
            qkv = normal(5, (heads + 2 * kv_heads) * d, dtype=dtype, scale=3.0)
            before = qkv.reshape(5, -1, d).clone()
            q_weight, k_weight = normal(d, dtype=dtype), normal(d, dtype=dtype)
            weight = torch.cat((q_weight.expand(heads, d), k_weight.expand(kv_heads, d)))
            calls.qk_norm(qkv, calls.attention_shape(heads, kv_heads, d), q_weight, k_weight, 1e-5)
            got, turned_heads = qkv.reshape(5, -1, d), heads + kv_heads
            x = before[:, :turned_heads]
            norm = torch.nn.functional.rms_norm
            plain = norm(x, (d,), None, 1e-5) * weight
            truth = norm(x.double(), (d,), None, 1e-5) * weight.double()
            measured += judged(f"{dtype} {d}", got[:, :turned_heads], plain, truth)
            kept = differing(got[:, turned_heads:], before[:, turned_heads:])
            measured.append((f"{dtype} {d} v kept", kept, 0.0))
    return measured


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, head_dim], cos and sin [rows, half]."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)


@case
def rope_kv_write() -> Measured:
    measured: Measured = []
    heads, kv_heads, d, half = 6, 2, 40, 16
    for dtype in DTYPES:
        qkv = normal(5, (heads + 2 * kv_heads) * d, dtype=dtype)
        before = qkv.clone()
        angle = torch.rand(50, half, device=DEVICE) * 6.3
        cos, sin = angle.cos(), angle.sin()
        positions, blocks = [0, 15, 16, 49, 7], [3, 0, 4, 2, -1]
        kv = calls.poisoned(6, kv_heads, 2, 16, d, dtype=dtype)
        shape = calls.attention_shape(heads, kv_heads, d)
        calls.rope_kv_write(qkv, shape, cos, sin, ints(positions), ints(blocks), kv)
        split = before.reshape(5, -1, d)
        expected = turned(split.double(), cos[positions], sin[positions])
        plain = turned(split.float(), cos[positions], sin[positions]).to(dtype)
        got = qkv.reshape(5, -1, d)
        measured += judged(f"{dtype} q", got[:, :heads], plain[:, :heads], expected[:, :heads])
        measured.append((f"{dtype} k and v kept", differing(got[:, heads:], split[:, heads:]), 0.0))
        written = torch.zeros(6, 16, dtype=torch.bool, device=DEVICE)
        for row, (position, block) in enumerate(zip(positions, blocks, strict=True)):
            if block < 0:
                continue
            written[block, position % 16] = True
            keys = slice(heads, heads + kv_heads)
            slot = kv[block, :, :, position % 16]
            measured += judged(f"{dtype} k", slot[:, 0], plain[row, keys], expected[row, keys])
            values = differing(slot[:, 1], split[row, heads + kv_heads :])
            measured.append((f"{dtype} v", values, 0.0))
        others = kv.permute(0, 3, 1, 2, 4)[~written]
        measured.append((f"{dtype} other slots", float((~others.isnan()).sum()), 0.0))
    return measured


@case
def kv_copy() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for kv_heads, d in ((2, 40), (1, 128)):
            kv = normal(5, kv_heads, 2, 16, d, dtype=dtype)
            expected = kv.clone()
            copies = [[0, 3, 0], [0, 3, 7], [0, 4, 7], [2, 1, 15]]
            for source, to, slot in copies:
                expected[to, :, :, slot] = kv[source, :, :, slot]
            packed = torch.tensor(copies, dtype=torch.int32, device=DEVICE)
            shape = calls.attention_shape(2 * kv_heads, kv_heads, d)
            calls.cuda.kv_copy(packed, shape, kv, calls.stream())
            measured.append((f"{dtype} {kv_heads}x{d}", differing(kv, expected), 0.0))
    return measured


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One row: q [heads, d], k and v [kv heads, keys, d]."""
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if window > 0:
        k, v = k[:, -window:], v[:, -window:]
    scores = torch.einsum("hd,hkd->hk", q, k) * q.shape[1] ** -0.5
    return torch.einsum("hk,hkd->hd", torch.softmax(scores, dim=1), v)


@case
def attention_decode() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for heads, kv_heads, d, window in sizes(
            ((32, 8, 128, 0), (9, 3, 64, 700), (7, 1, 80, 0)), ((3, 1, 16, 0), (4, 2, 40, 30))
        ):
            lengths = sizes([1, 16, 17, 511, 512, 513, 1500], [1, 16, 17, 40, 512, 513, 33])
            shape = calls.attention_shape(heads, kv_heads, d, window)
            blocks = (max(lengths) + 15) // 16
            pool = len(lengths) * blocks
            kv = normal(pool + 1, kv_heads, 2, 16, d, dtype=dtype)
            kv[pool] = float("nan")  # where tables point that nothing may be read from
            table = torch.full((len(lengths), blocks), pool, dtype=torch.int32, device=DEVICE)
            order = torch.randperm(pool, device=DEVICE, dtype=torch.int32)
            for row, length in enumerate(lengths):
                used = (length + 15) // 16
                table[row, :used] = order[row * blocks : row * blocks + used]
                if length > 32:
                    table[row, :2] = order[:2]  # a shared prefix
            qkv = normal(len(lengths), (heads + 2 * kv_heads) * d, dtype=dtype)
            positions = ints([length - 1 for length in lengths])
            op = calls.AttentionDecode(shape, len(lengths), heads * d, 16 * blocks, dtype)
            out = op(qkv, positions, table, kv).clone()
            expected, plain = [], []
            for row, length in enumerate(lengths):
                cache = kv[table[row].long()].permute(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, d)
                q, (k, v) = qkv[row, : heads * d].reshape(heads, d), cache[:, :, :length]
                expected.append(attend(q.double(), k.double(), v.double(), window).flatten())
                plain.append(attend(q, k, v, window).flatten())
            name = f"{dtype} {heads}/{kv_heads}x{d}"
            measured += judged(name, out, torch.stack(plain), torch.stack(expected))
            again = op(qkv, positions, table, kv)
            measured.append((f"{name} again", differing(out, again), 0.0))
            one = calls.AttentionDecode(shape, 1, heads * d, 16 * blocks, dtype)
            alone = one(qkv[5:6].contiguous(), positions[5:6], table[5:6].contiguous(), kv)
            measured.append((f"{name} alone", differing(out[5:6], alone), 0.0))
    return measured


@case
def attention_prefill() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for heads, kv_heads, d, window in sizes(
            ((32, 8, 128, 0), (9, 3, 64, 700), (12, 1, 96, 0)), ((4, 2, 16, 30),)
        ):
            # (cached positions, rows) of each sequence
            sequences = sizes(
                [(0, 300), (500, 40), (1027, 1), (0, 1), (16, 130)],
                [(0, 20), (500, 24), (35, 1), (0, 1)],
            )
            shape = calls.attention_shape(heads, kv_heads, d, window)
            blocks = max(a + b + 15 for a, b in sequences) // 16
            kv = normal(len(sequences) * blocks, kv_heads, 2, 16, d, dtype=dtype)
            order = torch.randperm(len(kv), device=DEVICE, dtype=torch.int32)
            table = order.reshape(len(sequences), blocks)
            rows = sum(count for _, count in sequences)
            qkv = normal(rows, (heads + 2 * kv_heads) * d, dtype=dtype)
            segments, at, tables, halves, positions = [], 0, [], [], []
            expected, plain = [], []
            for s, (cached, count) in enumerate(sequences):
                segments.append([at, count, cached])
                half = count // 2  # the same rows in two segments each
                halves += [[at, half, cached], [at + half, count - half, cached + half]]
                tables += [s] * count
                positions += range(cached, cached + count)
                cache = kv[table[s].long()].permute(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, d)
                for row in range(count):
                    q = qkv[at + row, : heads * d].reshape(heads, d)
                    k, v = cache[:, :, : cached + row + 1]
                    expected.append(attend(q.double(), k.double(), v.double(), window).flatten())
                    plain.append(attend(q, k, v, window).flatten())
                at += count
            packed = torch.tensor(segments, dtype=torch.int32, device=DEVICE)
            longest = max(count for _, count in sequences)
            call = (heads, d)
            out, lse = calls.attention_prefill(qkv, shape, packed, longest, table, kv, *call)
            name = f"{dtype} {heads}/{kv_heads}x{d}"
            measured += judged(name, out, torch.stack(plain), torch.stack(expected))
            measured.append((f"{name} lse", float((~lse.isfinite()).sum()), 0.0))
            cut = torch.tensor(halves, dtype=torch.int32, device=DEVICE)
            twice = table.repeat_interleave(2, 0).contiguous()
            again, sums = calls.attention_prefill(qkv, shape, cut, longest, twice, kv, *call)
            measured.append((f"{name} cut otherwise", differing(out, again), 0.0))
            measured.append((f"{name} lse cut otherwise", differing(lse, sums), 0.0))
            step = calls.AttentionDecode(shape, rows, heads * d, 16 * blocks, dtype)
            one = step(qkv, ints(positions), table[torch.tensor(tables)].contiguous(), kv)
            measured.append((f"{name} minus decode", differing(out, one), 0.0))
    return measured


def log_softmax(h: torch.Tensor, w: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(h @ w.T / temperature, dim=1)


def logprob_truth(
    logp: torch.Tensor, logq: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    at = tokens.long()[:, None]
    p, q = logp.exp(), logq.exp()
    return {
        "logprob": logp.gather(1, at)[:, 0],
        "entropy": -(p * logp).sum(1),
        "kl": (p * (logp - logq)).sum(1),
        "reverse_kl": (q * (logq - logp)).sum(1),
        "reference_logprob": logq.gather(1, at)[:, 0],
        "total_variation": (p - q).clamp_min(0).sum(1),
    }


SHAPES = sizes(
    ((1, 8, 64), (3, 111, 48), (130, 1000, 72), (517, 5003, 256)), ((1, 8, 64), (130, 111, 24))
)


@case
def linear_logprob() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for rows, vocab, cols in SHAPES:
            for offset in (0.0, 1e4):
                h = normal(rows, cols, dtype=dtype)
                ref = (h.float() + 0.2 * normal(rows, cols)).to(dtype)
                w = normal(vocab, cols, dtype=dtype, scale=2.0 * cols**-0.5)
                if offset:  # on every logit: one more column, constant in the weight
                    h[:, 0] = ref[:, 0] = offset
                    w[:, 0] = 1.0
                tokens = torch.randint(0, vocab, (rows,), dtype=torch.int32, device=DEVICE)
                op = calls.LinearLogprob(h, w, tokens, 0.8, ref)
                got = op.forward() | {"total_variation": op.total_variation()[0]}
                truth = logprob_truth(
                    log_softmax(h.double(), w.double(), 0.8),
                    log_softmax(ref.double(), w.double(), 0.8),
                    tokens,
                )
                plain = logprob_truth(
                    log_softmax(h.float(), w.float(), 0.8),
                    log_softmax(ref.float(), w.float(), 0.8),
                    tokens,
                )
                name = f"{dtype} {rows}x{vocab}x{cols} offset {offset:g}"
                for key, value in truth.items():
                    # An entropy or a divergence is a difference of larger numbers; and beside an
                    # offset of 1e4 each of a logit's products is rounded to about 2^-10.
                    rounding = 2**-10 * (rows * cols) ** 0.5 / float(value.norm())
                    budget = max(2 * error(plain[key], value), 1e-5, rounding if offset else 0.0)
                    measured.append((f"{name} {key}", error(got[key], value), budget))
                one = calls.LinearLogprob(
                    h[-1:].contiguous(), w, tokens[-1:].contiguous(), 0.8, ref[-1:].contiguous()
                )
                last = one.forward() | {"total_variation": one.total_variation()[0]}
                for key in truth:
                    alone = differing(last[key], got[key][-1:])
                    measured.append((f"{name} {key} alone", alone, 0.0))
    return measured


@case
def linear_logprob_at_the_edges() -> Measured:
    h = torch.zeros(4, 64, device=DEVICE)
    h[0, 0], h[1, 1], h[2, 2], h[3, 3] = 90.0, 1.0, float("nan"), 1.0
    w = torch.zeros(300, 64, device=DEVICE)
    w[17, 0] = w[139, 1] = 1.0
    w[:, 3] = -float("inf")
    w[5:9, 3] = 1.0  # of the last row four tokens are left
    got = calls.LinearLogprob(h.nan_to_num(), w.nan_to_num(neginf=-3e38), ints([17, 0, 0, 6]))
    out = got.forward()
    bad = calls.LinearLogprob(h, w[:, :].nan_to_num(neginf=0.0), ints([17, 300, 0, 6])).forward()
    return [
        ("one hot", abs(float(out["logprob"][0])), 1e-6),
        ("four of many", abs(float(out["entropy"][3]) - 1.3862943611), 1e-5),
        ("NaN stays in its row", float(bad["logprob"][2].isfinite()), 0.0),
        ("no token, no log-probability", float(bad["logprob"][1].isfinite()), 0.0),
        ("its entropy is there", float(not bad["entropy"][1].isfinite()), 0.0),
    ]


@case
def linear_logprob_backward() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        for rows, vocab, cols in sizes(
            ((3, 111, 48), (130, 1000, 72), (257, 9001, 128)), ((3, 111, 48), (7, 131, 24))
        ):
            h, ref = normal(rows, cols, dtype=dtype), normal(rows, cols, dtype=dtype)
            w = normal(vocab, cols, dtype=dtype, scale=2.0 * cols**-0.5)
            tokens = torch.randint(0, vocab, (rows,), dtype=torch.int32, device=DEVICE)
            names = ("logprob", "entropy", "kl", "reverse_kl", "total_variation")
            upstream = {name: normal(rows) for name in names}
            op = calls.LinearLogprob(h, w, tokens, 0.8, ref)
            op.forward()
            _, upstream["mass_above"] = op.total_variation()
            got = [g.clone() for g in op.backward(upstream) if g is not None]
            gradients = []
            for of in (torch.float64, dtype):
                x, y = (t.clone().to(of).requires_grad_() for t in (h, w))
                logq = log_softmax(ref.to(of), w.to(of), 0.8)
                values = logprob_truth(log_softmax(x, y, 0.8), logq, tokens)
                loss = sum((values[n] * upstream[n].to(of)).sum() for n in names)
                # The reference is a constant.
                gradients.append(torch.autograd.grad(loss, (x, y)))
            name = f"{dtype} {rows}x{vocab}x{cols}"
            for what, ours, truth, plain in zip(
                ("d_hidden", "d_weight"), got, *gradients, strict=True
            ):
                budget = max(2 * error(plain, truth), 2e-5 if dtype == torch.float32 else 4e-3)
                measured.append((f"{name} {what}", error(ours, truth), budget))
            again = op.backward(upstream)
            measured.append((f"{name} again", differing(again[0], got[0]), 0.0))
    return measured


@case
def head_sample() -> Measured:
    measured: Measured = []
    for dtype in DTYPES:
        rows, vocab, cols = sizes((200, 5003, 256), (20, 300, 40))
        h, w = normal(rows, cols, dtype=dtype), normal(vocab, cols, dtype=dtype, scale=0.1)
        uniforms = torch.rand(rows, dtype=torch.float64).tolist()
        keys = [(u, (0.0, 0.7, 1.0)[i % 3]) for i, u in enumerate(uniforms)]
        packed = calls.sample_rows(keys)
        tokens, logprobs, _ = calls.head_sample(h, w, packed)
        greedy = torch.tensor([d[1] == 0.0 for d in keys], device=DEVICE)
        logits = h.double() @ w.double().T
        best = logits.max(1).values - logits.gather(1, tokens.long()[:, None])[:, 0]
        measured.append((f"{dtype} greedy", float(best[greedy].max()), 1e-3))
        for temperature in (0.7, 1.0):
            at = [i for i, d in enumerate(keys) if d[1] == temperature]
            scored = calls.LinearLogprob(h[at], w, tokens[at].contiguous(), temperature).forward()
            bits = differing(scored["logprob"], logprobs[at])
            measured.append((f"{dtype} sampled minus scored at {temperature}", bits, 0.0))
        one = calls.head_sample(h[10:11].contiguous(), w, packed[10:11].contiguous())
        measured.append((f"{dtype} alone", differing(one[0], tokens[10:11]), 0.0))
        measured.append((f"{dtype} alone, value", differing(one[1], logprobs[10:11]), 0.0))
    # Many draws of one distribution over 300 tokens: chi-square per degree of freedom.
    draws = sizes(60_000, 0)
    if draws == 0:
        return measured
    h, w = normal(1, 64), normal(300, 64, scale=0.2)
    many = calls.sample_rows([(u, 1.0) for u in torch.rand(draws, dtype=torch.float64).tolist()])
    tokens, _, _ = calls.head_sample(h.expand(draws, 64).contiguous(), w, many)
    expected = draws * log_softmax(h.double(), w.double(), 1.0)[0].exp()
    counts = torch.bincount(tokens.long(), minlength=300).double()
    chi = float(((counts - expected) ** 2 / expected).sum() / 299)
    return [*measured, ("chi-square per degree of freedom", chi, 1.35)]


@case
def head_sample_truncated() -> Measured:
    """Every draw lies in the set that sorting by float64 keeps, and so does its mass."""
    measured: Measured = []
    rows, vocab, cols = sizes((200, 5003, 256), (20, 300, 40))
    limits = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.5, 0.0), (0, 1.0, 0.05)]
    for dtype in DTYPES:
        h, w = normal(rows, cols, dtype=dtype), normal(vocab, cols, dtype=dtype, scale=0.1)
        p = torch.softmax(h.double() @ w.double().T / 0.8, dim=1)
        best = p[:, :].argmax(1).to(torch.int32)  # each row may not draw its best token
        chosen = [(*limits[i % 5], i, i % 2) for i in range(rows)]
        draws = calls.sample_rows(
            [(u, 0.8) for u in torch.rand(rows, dtype=torch.float64).tolist()], chosen
        )
        tokens, logprobs, kept = calls.head_sample(h, w, draws, best)
        assert kept is not None
        outside, mass = 0.0, []
        for i, (top_k, top_p, min_p, _, bans) in enumerate(chosen):
            q = p[i].clone()
            if bans:
                q[best[i]] = 0.0
            order = q.argsort(descending=True)
            if top_k:
                q[order[top_k:]] = 0.0
            before = q[order].cumsum(0) - q[order]
            if top_p < 1.0:
                q[order[before >= top_p * q.sum()]] = 0.0
            q[q < min_p * q.max()] = 0.0
            outside += float(q[int(tokens[i])] == 0.0)
            mass.append(q.sum())
        measured.append((f"{dtype} drawn outside", outside, 0.0))
        truth = torch.stack(mass)
        # A token at the edge may fall to either side of it in float32.
        measured.append((f"{dtype} kept mass", error(kept, truth), 2e-3))
        scored = calls.LinearLogprob(h, w, tokens, 0.8).forward()
        bits = differing(scored["logprob"], logprobs)
        measured.append((f"{dtype} sampled minus scored", bits, 0.0))
    return measured
