"""A rollout before random models of the shapes of Qwen2.5-1.5B (prompter) and Llama-3.1-8B (target)
in bfloat16: the pipeline's own loop, beside two generate calls of transformers, and as a multiple
of the time that decoding takes to read what it must."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignpro import native
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.types import Rollout, SamplingParams
from gpu.calls import DEVICE
from gpu.cases import sizes
from gpu.models import LLAMA_8B, QWEN_1_5B, folder_of, position_bytes
from gpu.timing import Row, row, seconds

PROMPTS, REWRITES = sizes((32, 8), (2, 2))
NEW = sizes((64, 128), (2, 3))  # tokens of a rewrite, of a response
PROMPT = "How do bees find their way home, and what do they tell the others of the way they came?"
TIMED = 3


class Characters:
    """A token is a printable character, so that a text has as many tokens in both models."""

    bos_id = None
    eos_ids = (2,)

    def encode(self, text: str, *, add_bos: bool = False, most: int | None = None) -> list[int]:
        return [3 + (ord(character) - 33) % 94 for character in text]

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(33 + token % 94) for token in tokens)

    def encode_chat(
        self, messages: Any, *, add_generation_prompt: bool = True, most: int | None = None
    ) -> list[int]:
        return [1, *self.encode(messages[0]["content"])]


def load(folder: Path) -> NativeModel:
    model = native.core.Model.load(str(folder), device="cuda")
    tokenizer: Any = Characters()
    engine = native.core.Engine(
        model, kv_cache_bytes=sizes(0, 8 << 20), max_batch_rows=sizes(2048, 64)
    )
    return NativeModel(
        name=folder.name, path=folder, tokenizer=tokenizer, model=model, engine=engine
    )


def limit_seconds(model: NativeModel, lengths: Sequence[int], new: int, gbps: float) -> float:
    """Of ``new`` steps of sequences with so many positions before: the weights once a step, and
    every sequence's keys and values."""
    positions = sum(new * length + new * (new - 1) / 2 for length in lengths)
    weights = new * model.config["streamed_bytes"]
    return float((weights + positions * position_bytes(model)) / gbps / 1e9)


def transformers_seconds(folders: Sequence[Path], lengths: Sequence[int]) -> float | None:
    """Two generate calls on as many tokens; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    models = [
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).to(DEVICE).eval()
        for f in folders
    ]

    def generate(which: int, sequences: int, copies: int) -> None:
        vocab = (QWEN_1_5B, LLAMA_8B)[which].vocab
        ids = torch.randint(3, vocab, (sequences, lengths[which]), device=DEVICE)
        models[which].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW[which],
            max_new_tokens=NEW[which],
            do_sample=True,
            num_return_sequences=copies,
            pad_token_id=0,
        )

    def both() -> None:
        generate(0, PROMPTS, REWRITES)
        generate(1, PROMPTS * REWRITES, 1)

    both()
    return min(seconds(both) for _ in range(2))


@dataclass(frozen=True)
class Measured:
    seconds: float
    barrier: float  # likewise, where every rewrite is finished before the first response begins
    limit: float  # the two models' decoding, at the bandwidth
    lengths: list[int]  # of a prompt, of the prompter's and the target's


def ours(folders: Sequence[Path], gbps: float) -> Measured:
    models = [load(folder) for folder in folders]
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for new in NEW]
    pipeline = Pipeline(
        models[0], models[1], None, rewrite_params=params[0], response_params=params[1]
    )
    prompts = [f"{i}: {PROMPT}" for i in range(PROMPTS)]
    done: list[Rollout] = []

    def interleaved() -> None:
        done.append(pipeline.rollout(prompts, num_rewrites=REWRITES, seed=len(done)))

    def with_barrier() -> None:
        rewrites = pipeline.rewrite(prompts, num_rewrites=REWRITES, seed=len(done))
        pipeline.answer(prompts, [[w.text for w in group] for group in rewrites], seed=len(done))

    interleaved()
    with_barrier()
    times = [(seconds(interleaved), seconds(with_barrier)) for _ in range(TIMED)]
    took, barrier = (statistics.median(column) for column in zip(*times, strict=True))
    rewrites = [w for group in done[-1].rewrites for w in group]
    lengths = [[len(w.prompter_tokens) for w in rewrites], [len(w.target_tokens) for w in rewrites]]
    limit = sum(
        limit_seconds(model, length, new, gbps)
        for model, length, new in zip(models, lengths, NEW, strict=True)
    )
    return Measured(took, barrier, limit, [round(statistics.mean(length)) for length in lengths])


def bench_rollout(limit: dict[str, float], scratch: Path) -> list[Row]:
    folders = [
        folder_of("qwen-1.5b", QWEN_1_5B, scratch, DEVICE),
        folder_of("llama-8b", LLAMA_8B, scratch, DEVICE),
    ]
    torch.cuda.empty_cache()
    mine = ours(folders, limit["read_gbps"])
    torchs = transformers_seconds(folders, mine.lengths)
    work = (
        f"{PROMPTS} prompts x {REWRITES} x ({NEW[0]} + {NEW[1]} tokens), Qwen2.5-1.5B shape before "
        "Llama-3.1-8B shape, bf16; beside two transformers generate calls"
    )
    return [
        row(
            "rollout",
            work,
            1e3 * mine.seconds,
            None if torchs is None else 1e3 * torchs,
            barrier_over_ours=mine.barrier / mine.seconds,
            of_decode_limits=mine.seconds / mine.limit,
        )
    ]
