"""Random models on disk and in the device's engine, without a tokenizer: tokens in, tokens out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignpro import native
from alignpro.models.arguments import core_params
from alignpro.types import SamplingParams
from gpu.cases import sizes

Answer = tuple[list[int], list[float]]  # tokens, log-probabilities


@dataclass(frozen=True)
class Shape:
    """A Llama with a head of its own."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int = 2048


# Llama 3.1, and Qwen2.5-1.5B without its biases and with a head of its own.
LLAMA_8B = sizes(
    Shape(4096, 32, 32, 8, 128, 14336, 128256, context=4096),
    Shape(64, 2, 4, 2, 16, 96, 200, context=512),
)
QWEN_1_5B = sizes(
    Shape(1536, 28, 12, 2, 128, 8960, 151936), Shape(64, 1, 4, 2, 16, 96, 300, context=512)
)


def tensors(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    name, hidden = f"model.layers.{layer}", shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.{norm}.weight", (hidden,)
    for site, rows, cols in (
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", shape.intermediate, hidden),
        ("mlp.up_proj", shape.intermediate, hidden),
        ("mlp.down_proj", hidden, shape.intermediate),
    ):
        yield f"{name}.{site}.weight", (rows, cols)


def write_folder(shape: Shape, folder: Path, device: str = "cpu", seed: int = 0) -> None:
    """bfloat16 weights, normal with a deviation of fan-in ** -0.5, norms 1; a file a layer. What
    transformers and the engine load. Drawn on ``device``, where 8 billion take seconds."""
    folder.mkdir(parents=True)
    draw = torch.Generator(device).manual_seed(seed)
    ends = [
        ("model.embed_tokens.weight", (shape.vocab, shape.hidden)),
        ("lm_head.weight", (shape.vocab, shape.hidden)),
        ("model.norm.weight", (shape.hidden,)),
    ]
    files = [ends, *(list(tensors(shape, layer)) for layer in range(shape.layers))]
    index: dict[str, str] = {}
    for number, content in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dims in content:
            size = 2 * torch.Size(dims).numel()
            offsets = [at, at + size]
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": offsets}
            index[name] = file
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, dims in content:
                values = torch.ones(dims, device=device)
                if len(dims) == 2:
                    values = torch.randn(dims, generator=draw, device=device) * dims[1] ** -0.5
                words = values.to(torch.bfloat16).view(torch.int16).cpu().contiguous()
                out.write(memoryview(words.numpy()).cast("B"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def folder_of(name: str, shape: Shape, scratch: Path, device: str) -> Path:
    """Written by the first who asks."""
    folder = scratch / name
    if not folder.exists():
        write_folder(shape, folder, device)
    return folder


def lora(model: Any, rank: int) -> Any:
    """Random matrices on every linear."""
    draw = np.random.default_rng(9)
    matrices = {
        path: (
            draw.standard_normal((rank, inputs)).astype(np.float32) * 0.05,
            draw.standard_normal((outputs, rank)).astype(np.float32) * 0.05,
        )
        for path, (outputs, inputs) in model.lora_modules().items()
    }
    return model.make_adapter(matrices, 1.0)


def position_bytes(model: Any) -> int:
    """Keys and values of one position in bfloat16, all layers."""
    c = model.config
    return int(2 * 2 * c["num_layers"] * c["num_kv_heads"] * c["head_dim"])


def params(count: int, seed: int, temperature: float = 1.0) -> Any:
    """Of exactly ``count`` tokens, all drawn from the whole distribution."""
    drawn = SamplingParams(
        max_new_tokens=count, temperature=temperature, seed=seed, ignore_eos=True
    )
    return core_params(drawn, sample=0)


def generate(
    engine: Any, prompts: Sequence[list[int]], count: int, adapters: Sequence[Any] | None = None
) -> list[Answer]:
    """A request's draws are keyed by its prompt's first token."""
    with_ = adapters or [None] * len(prompts)
    client = native.core.Client(engine)
    handles = [
        client.submit(prompt, params(count, prompt[0]), adapter)
        for prompt, adapter in zip(prompts, with_, strict=True)
    ]
    client.run()
    return [(h.tokens, h.logprobs) for h in handles]
