"""The sizes of a model, without its weights: from its files, or from what its makers published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignpro.models.resolve import find_model
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import core

BF16_BYTES = 2.0


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder as `alignpro` runs it (every family reduces to these)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    tied_head: bool = False
    fused_projections: bool = False  # Phi-3: one matrix for q, k and v, one for gate and up

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear that a LoRA can attach to, by its PEFT path."""
        hidden, inner = self.hidden_size, self.intermediate_size
        if self.fused_projections:
            attention = {"qkv_proj": (self.q_size + 2 * self.kv_size, hidden)}
            mlp = {"gate_up_proj": (2 * inner, hidden)}
        else:
            attention = {"q_proj": (self.q_size, hidden)}
            attention |= {name: (self.kv_size, hidden) for name in ("k_proj", "v_proj")}
            mlp = {name: (inner, hidden) for name in ("gate_proj", "up_proj")}
        attention["o_proj"], mlp["down_proj"] = (hidden, self.q_size), (hidden, inner)
        layer = {f"self_attn.{name}": size for name, size in attention.items()}
        layer |= {f"mlp.{name}": size for name, size in mlp.items()}
        return {
            f"model.layers.{number}.{name}": size
            for number in range(self.num_layers)
            for name, size in layer.items()
        }

    @property
    def linear_parameters(self) -> int:
        """Of the layers' matrices."""
        return sum(rows * cols for rows, cols in self.linears.values())

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Of all matrices; norms and biases are a ten-thousandth of them."""
        tables = 1 if self.tied_head else 2
        return self.linear_parameters + tables * self.head_parameters

    @property
    def kv_elements(self) -> int:
        """Numbers that a position keeps, in all layers."""
        return 2 * self.num_layers * self.kv_size


@dataclass(frozen=True)
class PricedModel:
    """A model's shape, the bytes of its weights, and where both are from."""

    name: str
    shape: ModelShape
    weight_bytes: int
    storage: str  # "Q4_1", "bf16"
    source: str  # "files", "published"
    path: Path | None = None

    @property
    def bytes_per_parameter(self) -> float:
        return self.weight_bytes / self.shape.parameters

    @property
    def streamed_bytes(self) -> int:
        """What a step reads however few rows it has: layers and head, not the embedding."""
        read = self.shape.linear_parameters + self.shape.head_parameters
        return round(read * self.bytes_per_parameter)

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, where the files are here."""
        if self.path is None:
            return None
        if self.path.is_file():
            return Tokenizer.from_gguf(core.read_gguf_metadata(str(self.path)), str(self.path))
        return Tokenizer.from_folder(self.path)


# The config.json of each, as published on the hub; weights in bfloat16.
PUBLISHED = {
    "microsoft/Phi-3.5-mini-instruct": ModelShape(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        context_length=131072,
        fused_projections=True,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        context_length=32768,
        tied_head=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ModelShape(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        context_length=131072,
    ),
}


def find_shape(name: str) -> PricedModel:
    """The model's sizes, from files that are here or from `PUBLISHED`; nothing is fetched.

    Raises:
        FileNotFoundError: neither has it. ValueError: a configuration that lacks a size.
    """
    path = find_model(name)
    if path is None:
        if name not in PUBLISHED:
            raise FileNotFoundError(
                f"model {name!r}: not on this machine, and not among those whose sizes are known "
                f"({', '.join(PUBLISHED)}); name a path, or fetch it first"
            )
        shape = PUBLISHED[name]
        size = round(shape.parameters * BF16_BYTES)
        return PricedModel(name, shape, size, "bf16", "published")
    if path.is_file():
        metadata = core.read_gguf_metadata(str(path))
        shape = from_gguf(metadata, str(path), tied_head=not _has_tensor(path, "output.weight"))
        return PricedModel(name, shape, path.stat().st_size, "GGUF", "files", path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return PricedModel(
        name, from_config(config, str(path / "config.json")), size, "safetensors", "files", path
    )


def from_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes."""

    def size(key: str, otherwise: int | None = None) -> int:
        value = config.get(key)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: expected a positive integer {key!r}, got {value!r}")
        return value

    family = config.get("model_type")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return ModelShape(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", 128 if family == "qwen3" else hidden // heads),
        context_length=size("max_position_embeddings"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        fused_projections=family == "phi3",
    )


def from_gguf(metadata: Mapping[str, Any], where: str, *, tied_head: bool) -> ModelShape:
    """The shape that the metadata of a GGUF file describes; its tensors say ``tied_head``."""
    family = metadata.get("general.architecture")

    def size(key: str, otherwise: int | None = None) -> int:
        value = metadata.get(f"{family}.{key}", otherwise)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: expected a positive integer '{family}.{key}', got {value}")
        return value

    hidden, heads = size("embedding_length"), size("attention.head_count")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return ModelShape(
        vocab_size=size("vocab_size", len(tokens)),
        hidden_size=hidden,
        intermediate_size=size("feed_forward_length"),
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=size("attention.key_length", hidden // heads),
        context_length=size("context_length"),
        tied_head=tied_head,
        fused_projections=family == "phi3",
    )


def _has_tensor(path: Path, name: str) -> bool:
    try:
        core.QuantizedWeight.from_gguf(str(path), name)
    except ValueError:
        return False
    return True
