"""Random models in bfloat16. A Llama-3.1-8B shape: decode beside transformers' generate (static
cache), as a share of the bandwidth limit of the same run, and prefill, as a share of its matrix
rate. A 1.5B shape: the gradient of a training step, likewise."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from alignpro import native
from alignpro.models.native_model import wheel_folders
from gpu.calls import DEVICE
from gpu.cases import sizes
from gpu.models import LLAMA_8B, QWEN_1_5B, folder_of, lora, params, position_bytes, tensors
from gpu.timing import Row, row, seconds

CONTEXT, TIMED, UNTIMED = sizes((1024, 48, 16), (20, 6, 2))  # positions at the end; steps
SEQUENCES = sizes((1, 64), (1, 3))
PREFILL = sizes((8, 2048), (2, 16))  # sequences, tokens of each


def step_bytes(model: native.core.Model, sequences: int) -> float:
    """What a step must read: the weights once, and every sequence's keys and values."""
    positions = sequences * (CONTEXT - TIMED // 2)
    return float(model.config["streamed_bytes"] + positions * position_bytes(model))


def ours(model: native.core.Model, sequences: int) -> float:
    """Milliseconds a step, the median of TIMED: forward, draw, and the tokens back on the host."""
    blocks = sequences * (CONTEXT // 16 + 2)
    cache = blocks * 16 * position_bytes(model)
    engine = native.core.Engine(
        model, kv_cache_bytes=cache, max_batch_rows=2048, prefix_cache=False
    )
    length = CONTEXT - TIMED - UNTIMED
    prompts = torch.randint(3, LLAMA_8B.vocab, (sequences, length)).tolist()
    client = native.core.Client(engine)
    handles = [
        client.submit(prompt, params(CONTEXT - length, i)) for i, prompt in enumerate(prompts)
    ]
    while any(len(handle.tokens) == 0 for handle in handles):
        engine.step()
    # Sequences whose prefill ended first are ahead; all of them still decode through the timing.
    times = []
    while len(times) < TIMED and not any(handle.finished for handle in handles):
        start = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - start))
    client.run()
    return statistics.median(times[4:])  # the first of a shape run without their graph


def prefill_flops() -> float:
    """Of PREFILL's layers: two a weight and position, and causal attention; the head's one row a
    sequence is left out."""
    s, (sequences, length) = LLAMA_8B, PREFILL
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    weights = s.layers * (s.hidden * (2 * q + 2 * kv) + 3 * s.hidden * s.intermediate)
    attention = s.layers * 2 * q * length * (length + 1)
    return float(sequences * (2 * length * weights + attention))


def prefill(model: native.core.Model) -> float:
    """Milliseconds to the first tokens of all sequences."""
    sequences, length = PREFILL
    engine = native.core.Engine(
        model, kv_cache_bytes=sizes(8 << 30, 8 << 20), max_batch_rows=8192, prefix_cache=False
    )
    prompts = torch.randint(3, LLAMA_8B.vocab, (sequences, length)).tolist()

    def first_tokens() -> None:
        client = native.core.Client(engine)
        for i, prompt in enumerate(prompts):
            client.submit(prompt, params(1, i))
        client.run()

    first_tokens()
    return 1e3 * statistics.median(seconds(first_tokens) for _ in range(3))


def transformers_step(folder: Path, sequences: int) -> float | None:
    """Milliseconds a token of generate, the prefill's share taken out by a shorter run; None where
    transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(DEVICE).eval()
    length = CONTEXT - TIMED - UNTIMED
    ids = torch.randint(3, LLAMA_8B.vocab, (sequences, length), device=DEVICE)

    def generate(count: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=True,
            cache_implementation="static",
            pad_token_id=0,
        )

    generate(8)  # compiles and captures
    generate(UNTIMED)
    few, many = (seconds(lambda n=n: generate(n)) for n in (UNTIMED, UNTIMED + TIMED))
    return 1e3 * (many - few) / TIMED


def bench_model(limit: dict[str, float], scratch: Path, peers: bool) -> list[Row]:
    """Decode and prefill, deterministic and by cuBLASLt; without peers the first alone."""
    rows: list[Row] = []
    folder = folder_of("llama-8b", LLAMA_8B, scratch, DEVICE)
    torch.cuda.empty_cache()
    mine: dict[tuple[str, int], float] = {}
    first: dict[str, float] = {}
    for deterministic in (True, False) if peers else (True,):
        model = native.core.Model.load(
            str(folder),
            device="cuda",
            deterministic=deterministic,
            library_folders=wheel_folders(),
        )
        mode = "deterministic" if deterministic else "cuBLASLt"
        mine |= {(mode, n): ours(model, n) for n in SEQUENCES}
        limits = {n: step_bytes(model, n) / limit["read_gbps"] / 1e6 for n in SEQUENCES}
        first[mode] = prefill(model)
        del model
    theirs = {n: transformers_step(folder, n) if peers else None for n in SEQUENCES}
    for (mode, sequences), milliseconds in mine.items():
        rows.append(
            row(
                "decode",
                f"Llama-3.1-8B shape bf16, {sequences} sequences, context {CONTEXT}, {mode}; "
                "beside transformers generate, static cache",
                milliseconds,
                theirs[sequences],
                share_of_bandwidth=limits[sequences] / milliseconds,
                tokens_per_second=1e3 * sequences / milliseconds,
            )
        )
    for mode, milliseconds in first.items():
        rate = prefill_flops() / milliseconds / 1e9 / limit["matrix_tflops"]
        work = f"Llama-3.1-8B shape bf16, {PREFILL[0]} x {PREFILL[1]} tokens, {mode}"
        rows.append(row("prefill", work, milliseconds, None, share_of_matrix_rate=rate))
    return rows


# Of a step: prompts, rewrites of each, and tokens of both.
PROMPTS, REWRITES, PROMPT_TOKENS, REWRITE_TOKENS = sizes((16, 8, 64, 64), (2, 2, 3, 2))


def gradient_flops() -> float:
    """The products of a step: policy, reference and dX over the layers, a prompt's rows once; the
    vocabulary's forward of both, both again in the backward, and its dX."""
    rows = PROMPTS * (PROMPT_TOKENS + REWRITES * REWRITE_TOKENS)
    layer = sum(a * b for _, (a, b) in ((n, s) for n, s in tensors(QWEN_1_5B, 0) if len(s) == 2))
    values = PROMPTS * REWRITES * REWRITE_TOKENS
    head = QWEN_1_5B.vocab * QWEN_1_5B.hidden
    return 2.0 * (3 * rows * layer * QWEN_1_5B.layers + 5 * values * head)


def bench_gradient(limit: dict[str, float], scratch: Path) -> list[Row]:
    """Scores with an exact KL to the base, and the gradients on the host; kept and recomputed."""
    folder = folder_of("qwen-1.5b", QWEN_1_5B, scratch, DEVICE)
    torch.cuda.empty_cache()
    model = native.core.Model.load(str(folder), device="cuda")
    adapter = lora(model, 16)
    sequences = [
        prompt + torch.randint(3, QWEN_1_5B.vocab, (REWRITE_TOKENS,)).tolist()
        for prompt in torch.randint(3, QWEN_1_5B.vocab, (PROMPTS, PROMPT_TOKENS)).tolist()
        for _ in range(REWRITES)
    ]
    starts = [PROMPT_TOKENS] * len(sequences)
    upstream = np.full(len(sequences) * REWRITE_TOKENS, 1e-4, np.float32)
    rows: list[Row] = []
    for activations in ("keep", "recompute"):
        options = {"adapter": adapter, "with_reference": True, "keep_graph": True}
        options["activations"] = activations
        times = []
        for _ in range(6):
            start = time.perf_counter()
            score = model.score(sequences, starts, **options)
            score.backward(upstream, None, upstream)
            times.append(1e3 * (time.perf_counter() - start))
        milliseconds = statistics.median(times[1:])
        rate = gradient_flops() / milliseconds / 1e9
        rows.append(
            row(
                "gradient",
                f"Qwen2.5-1.5B shape bf16, rank 16, {PROMPTS} x {REWRITES} x "
                f"({PROMPT_TOKENS} + {REWRITE_TOKENS}) tokens, KL to the base, {activations}",
                milliseconds,
                None,
                share_of_matrix_rate=rate / limit["matrix_tflops"],
                workspace_mb=model.score_bytes(sequences, starts, **options) / 1e6,
            )
        )
    return rows
