"""A model on the GPU, held as the ops are: beside the CPU engine in float32, and against itself to
the bit; what it generates, and its gradients."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import native
from alignpro.models.native_model import wheel_folders
from gpu.cases import Measured, case, sizes
from gpu.models import Shape, generate, lora, write_folder

# Groups of 2 and 4; more than a tile of everything, an odd vocabulary.
SHAPE = sizes(Shape(512, 4, 8, 2, 64, 1408, 5003), Shape(64, 2, 4, 2, 16, 96, 300, 64))
PROMPTS = [
    [int(n) for n in np.random.default_rng(i).integers(3, SHAPE.vocab, size)]
    for i, size in enumerate(sizes((5, 33, 300, 1100, 17, 64, 2), (5, 19, 2)))
]
# One that begins as another does, inside a block of positions.
PROMPTS.append([*PROMPTS[1][:-3], 7])
NEW = sizes(24, 3)


def load_shape() -> tuple[Any, dict[str, Any]]:
    """SHAPE's random weights in the CPU engine, and on the device by what they compute in."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_folder(SHAPE, folder)
        load = native.core.Model.load
        device = {c: load(str(folder), device="cuda", compute=c) for c in ("float32", "bfloat16")}
        return load(str(folder)), device


@case
def model_generates() -> Measured:
    core, measured = native.core, []
    cpu, models = load_shape()
    for compute, model in models.items():
        adapter = lora(model, 6)
        for name in sizes(("base", "adapter", "mixed"), ("mixed",)):
            which = {"base": 0, "adapter": 1}
            adapters = [adapter if which.get(name, i % 2) else None for i in range(len(PROMPTS))]
            engine = core.Engine(
                model, kv_cache_bytes=sizes(256, 1) << 20, max_batch_rows=sizes(256, 24)
            )
            together = generate(engine, PROMPTS, NEW, adapters)
            wrong = {"scored": 0.0, "alone": 0.0, "again": 0.0}
            wrong["again"] = float(generate(engine, PROMPTS, NEW, adapters) != together)
            for i, (prompt, (tokens, logprobs)) in enumerate(zip(PROMPTS, together, strict=True)):
                with_ = {"adapter": adapters[i]}
                scored = model.score([prompt + tokens], [len(prompt)], **with_)
                wrong["scored"] += float(np.sum(scored.logprob != np.float32(logprobs)))
                if i % 2 == 0:
                    alone = core.Engine(
                        model, kv_cache_bytes=sizes(64, 1) << 20, prefix_cache=False
                    )
                    wrong["alone"] += float(
                        generate(alone, [prompt], NEW, [adapters[i]])[0] != together[i]
                    )
                theirs = cpu.score([prompt + tokens], [len(prompt)], **with_)
                far = float(np.abs(scored.logprob - theirs.logprob).max())
                # bfloat16: eight bits of mantissa through the layers; a wrong row is off by nats.
                budget = 1e-4 if compute == "float32" else 0.5
                measured.append((f"{compute} {name} {i} minus the CPU's", far, budget))
            measured += [(f"{compute} {name} {what}", n, 0.0) for what, n in wrong.items()]
    return measured


def norm_of(gradients: dict[str, Any], other: dict[str, Any] | None = None) -> float:
    """Of the difference, over all matrices at once."""
    total = 0.0
    for path, pair in gradients.items():
        for which, matrix in enumerate(pair):
            minus = 0.0 if other is None else other[path][which]
            total += float(((matrix.astype(np.float64) - minus) ** 2).sum())
    return total**0.5


@case
def model_gradients() -> Measured:
    """Of a loss of log-probability, entropy and KL to a reference adapter, over sequences with
    common beginnings. float32 beside the CPU engine; bfloat16 rounds eight bits through the layers
    and back, of weights too."""
    measured: Measured = []
    cpu, models = load_shape()
    draw = np.random.default_rng(3)
    count, length = sizes((12, 90), (3, 9))
    shared = [int(n) for n in draw.integers(3, SHAPE.vocab, sizes(200, 19))]
    sequences = [
        [*shared, *(int(n) for n in draw.integers(3, SHAPE.vocab, length))] for _ in range(count)
    ]
    # One begins inside the others' own tokens.
    sequences.append([*sequences[0][: len(shared) + 5], *sequences[1][-4:]])
    starts = [len(shared)] * len(sequences)
    total = sum(map(len, sequences)) - sum(starts)
    upstream = [draw.standard_normal(total).astype(np.float32) / total for _ in range(3)]

    def gradients(model: Any, activations: str) -> tuple[dict[str, Any], Any]:
        score = model.score(
            sequences, starts, adapter=lora(model, 6), reference=lora(model, 3),
            with_reference=True, keep_graph=True, activations=activations,
        )  # fmt: skip
        return score.backward(*upstream), score

    truth, theirs = gradients(cpu, "keep")
    for compute, model in models.items():
        kept, score = gradients(model, "keep")
        again, _ = gradients(model, "recompute")
        budget = 2e-5 if compute == "float32" else 5e-2
        far = norm_of(kept, truth) / norm_of(truth)
        measured.append((f"{compute} minus the CPU's", far, budget))
        measured.append((f"{compute} recomputed", norm_of(again, kept), 0.0))
        alone = sum(
            float(np.sum(model.score([s], [len(shared)], adapter=lora(model, 6)).logprob != mine))
            for s, mine in zip(
                sequences,
                np.split(score.logprob, np.cumsum([len(s) - len(shared) for s in sequences])[:-1]),
                strict=True,
            )
        )
        measured.append((f"{compute} alone", alone, 0.0))
        kl = float(np.abs(score.kl - theirs.kl).max())
        measured.append(
            (f"{compute} kl minus the CPU's", kl, 1e-5 if compute == "float32" else 2e-2)
        )
    return measured


@case
def model_fast() -> Measured:
    """Products by cuBLASLt beside deterministic ones: other sums, so other last digits and perhaps
    other tokens."""
    core, measured = native.core, []
    budgets = {"float32": 1e-4, "bfloat16": 0.5}  # as above
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_folder(SHAPE, folder)
        for compute, budget in budgets.items():
            exact = core.Model.load(str(folder), device="cuda", compute=compute)
            fast = core.Model.load(
                str(folder),
                device="cuda",
                compute=compute,
                deterministic=False,
                library_folders=wheel_folders(),
            )
            adapters = [lora(fast, 6) if i % 2 else None for i in range(len(PROMPTS))]
            engine = core.Engine(
                fast, kv_cache_bytes=sizes(256, 1) << 20, max_batch_rows=sizes(256, 24)
            )
            answers = generate(engine, PROMPTS, NEW, adapters)
            for i, (prompt, (tokens, logprobs)) in enumerate(zip(PROMPTS, answers, strict=True)):
                request = ([prompt + tokens], [len(prompt)], adapters[i])
                own, other = (model.score(*request).logprob for model in (fast, exact))
                sampled = float(np.abs(own - np.float32(logprobs)).max())
                apart = float(np.abs(own - other).max())
                measured.append((f"{compute} {i} sampled minus scored", sampled, budget))
                measured.append((f"{compute} {i} minus deterministic", apart, budget))
    return measured
