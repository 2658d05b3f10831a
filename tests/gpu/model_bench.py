"""Decode of a random Llama-3.1-8B shape in bfloat16 beside transformers' generate (static cache),
as a share of the bandwidth limit of the same run."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch

from alignpro import native
from gpu.models import LLAMA_8B, params, write_folder

CONTEXT, TIMED, UNTIMED = 1024, 48, 16  # positions when the timing ends; steps


def step_bytes(model: native.core.DeviceModel, sequences: int) -> float:
    """What a step must read: the weights once, and every sequence's keys and values."""
    c = model.config
    per_position = 2 * 2 * c["num_layers"] * c["num_kv_heads"] * c["head_dim"]
    return float(c["streamed_bytes"] + sequences * (CONTEXT - TIMED // 2) * per_position)


def ours(model: native.core.DeviceModel, sequences: int) -> float:
    """Milliseconds a step, the median of TIMED: forward, draw, and the tokens back on the host."""
    blocks = sequences * (CONTEXT // 16 + 2)
    c = model.config
    block = 2 * 2 * 16 * c["num_layers"] * c["num_kv_heads"] * c["head_dim"]
    engine = native.core.Engine(
        model, kv_cache_bytes=blocks * block, max_batch_rows=2048, prefix_cache=False
    )
    length = CONTEXT - TIMED - UNTIMED
    prompts = torch.randint(3, c["vocab_size"], (sequences, length)).tolist()
    handles = [
        engine.submit(prompt, params(CONTEXT - length, i)) for i, prompt in enumerate(prompts)
    ]
    while any(len(handle.tokens) == 0 for handle in handles):
        engine.step()
    # Sequences whose prefill ended first are ahead; all of them still decode through the timing.
    times = []
    while len(times) < TIMED and not any(handle.finished for handle in handles):
        start = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - start))
    engine.run(handles)
    return statistics.median(times[4:])  # the first of a shape run without their graph


def transformers_step(folder: Path, sequences: int) -> float | None:
    """Milliseconds a token of generate, the prefill's share taken out by a shorter run; None where
    transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda").eval()
    length = CONTEXT - TIMED - UNTIMED
    ids = torch.randint(3, LLAMA_8B.vocab, (sequences, length), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=True,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(8)  # compiles and captures
    seconds(UNTIMED)
    few, many = seconds(UNTIMED), seconds(UNTIMED + TIMED)
    return 1e3 * (many - few) / TIMED


def bench_decode(limit: dict[str, float], with_peer: bool = True) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "llama-8b"
        write_folder(LLAMA_8B, folder, "cuda")
        torch.cuda.empty_cache()
        model = native.core.DeviceModel.load(str(folder))
        mine = {n: ours(model, n) for n in (1, 64)}
        limits = {n: step_bytes(model, n) / limit["read_gbps"] / 1e6 for n in mine}
        del model
        for sequences, milliseconds in mine.items():
            rows.append(
                {
                    "op": "decode",
                    "work": f"Llama-3.1-8B shape bf16, {sequences} sequences, context {CONTEXT}; "
                    "beside transformers generate, static cache",
                    "ours_ms": milliseconds,
                    "torch_ms": transformers_step(folder, sequences) if with_peer else None,
                    "share_of_bandwidth": limits[sequences] / milliseconds,
                    "tokens_per_second": 1e3 * sequences / milliseconds,
                }
            )
    return rows
