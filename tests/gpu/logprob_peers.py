"""The log-probability with its KL beside everybody that tests/bench/heads.py knows, where their
packages are: each at what it can compute, chunked by tokens where it would hold all logits."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import heads
from gpu import calls
from gpu.calls import DEVICE, EMULATED
from gpu.cases import sizes
from gpu.timing import Row, milliseconds, row

CHUNK = 1024  # tokens, of those that hold all logits: 0.5 GB of float32 each at V = 131072
HOLD_LOGITS = ("torch", "torch.compile", "liger divergence")


def on_device(inputs: heads.HeadInputs) -> heads.HeadInputs:
    """In bfloat16, but for ids and derivatives."""
    to = {
        name: getattr(inputs, name).to(DEVICE, torch.bfloat16)
        for name in ("weight", "hidden", "reference_hidden")
    }
    kept = {name: getattr(inputs, name).to(DEVICE) for name in ("tokens", "d_logprob", "d_kl")}
    return replace(inputs, **to, **kept)


def chunks(inputs: heads.HeadInputs, size: int) -> list[heads.HeadInputs]:
    names = ("hidden", "reference_hidden", "tokens", "d_logprob", "d_kl")
    return [
        replace(inputs, **{name: getattr(inputs, name)[at : at + size] for name in names})
        for at in range(0, len(inputs.hidden), size)
    ]


def bench_logprob(limit: dict[str, float], peers: bool) -> list[Row]:
    rows, cols, vocab = sizes((8192, 4096, 131072), (5, 64, 300))
    work = f"{rows} x {cols} x {vocab} bf16"
    inputs = on_device(heads.make_inputs(heads.HeadSpec(vocab, cols, rows)))
    ids = inputs.tokens.to(torch.int32)
    flops = 2.0 * rows * cols * vocab
    peak = limit["matrix_tflops"]
    table: list[Row] = []
    times: dict[tuple[str, str], float] = {}
    upstream = {"logprob": inputs.d_logprob, "kl": inputs.d_kl, "entropy": inputs.d_kl}
    for what, reference in (("logprob, entropy, KL", inputs.reference_hidden), ("logprob", None)):
        op = calls.LinearLogprob(inputs.hidden, inputs.weight, ids, 1.0, reference)
        wanted = upstream if reference is not None else {"logprob": inputs.d_logprob}
        forward = milliseconds(op.forward, 7)
        backward = milliseconds(lambda op=op, wanted=wanted: op.backward(wanted, False), 5)
        times[what, "forward"], times[what, "forward + d_hidden"] = forward, forward + backward
        products = 1 if reference is None else 2
        table.append(
            row(
                "linear_logprob",
                f"{work}: {what}",
                forward,
                None,
                share_of_matrix_rate=products * flops / forward / 1e9 / peak,
                workspace_mb=op.memory.numel() / 1e6,
            )
        )
        table.append(
            row(
                "linear_logprob_backward",
                f"{work}: d_hidden by {what}",
                backward,
                None,
                share_of_matrix_rate=(products + 1) * flops / backward / 1e9 / peak,
            )
        )
    for peer in heads.PEERS if peers else ():
        if EMULATED and peer.compiles:
            continue  # for half a minute, on a CPU
        size = CHUNK if peer.name in HOLD_LOGITS else rows
        pieces = chunks(inputs, size)
        try:
            compute = heads.prepared(peer, pieces[0])
        except heads.Unavailable as reason:
            print(f"{peer.name}: skipped: {reason}")
            continue

        def forward_all(pieces=pieces, compute=compute) -> None:  # type: ignore[no-untyped-def]
            for piece in pieces:
                heads.forward(compute, piece)

        def both_all(pieces=pieces, compute=compute) -> None:  # type: ignore[no-untyped-def]
            for piece in pieces:
                heads.forward_backward(compute, piece)

        what = "logprob, entropy, KL" if peer.computes == heads.BOTH else "logprob"
        for part, run in (("forward", forward_all), ("forward + d_hidden", both_all)):
            theirs = milliseconds(run, 3)
            told = f"{work}: {what} {part}, beside {peer.name} ({peer.computes})"
            table.append(row("linear_logprob", told, times[what, part], theirs))
    return table
