"""A random model of a real shape, for benchmarks at sizes that are not at hand.

    python tests/bench/random_model.py --shape qwen2.5-0.5b --out FOLDER

Writes FOLDER/hf (config.json, model.safetensors and a byte-level tokenizer padded to the
vocabulary) and FOLDER/NAME.QUANTIZATION.gguf, quantised from the same weights. Weights are normal
with a deviation of 0.02, norms 1. Needs the packages of the test extra.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DEVIATION = 0.02
CONTEXT, EPSILON = 32768, 1e-6
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("o", "n"))
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUANTIZATIONS = {
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model with a tied head: biases on Q, K and V."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    rope_theta: float = 1e6

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "tiny": Shape(64, 2, 4, 2, 96, 320),  # what a test can afford
}


def tensors(shape: Shape, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name in a Hugging Face folder, name in a GGUF file, float32 values)."""
    draw = np.random.default_rng(seed)

    def normal(*sizes: int) -> np.ndarray:
        return draw.standard_normal(sizes, dtype=np.float32) * np.float32(DEVIATION)

    ones = np.ones(shape.hidden, np.float32)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", "token_embd.weight", normal(shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        theirs, ggml = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{theirs}.input_layernorm.weight", f"{ggml}.attn_norm.weight", ones
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            site, short = f"{theirs}.self_attn.{name}_proj", f"{ggml}.attn_{name}"
            yield f"{site}.weight", f"{short}.weight", normal(rows, shape.hidden)
            yield f"{site}.bias", f"{short}.bias", normal(rows)
        output = normal(shape.hidden, queries)
        yield f"{theirs}.self_attn.o_proj.weight", f"{ggml}.attn_output.weight", output
        yield f"{theirs}.post_attention_layernorm.weight", f"{ggml}.ffn_norm.weight", ones
        for name in ("gate", "up"):
            weight = normal(shape.intermediate, shape.hidden)
            yield f"{theirs}.mlp.{name}_proj.weight", f"{ggml}.ffn_{name}.weight", weight
        down = normal(shape.hidden, shape.intermediate)
        yield f"{theirs}.mlp.down_proj.weight", f"{ggml}.ffn_down.weight", down
    yield "model.norm.weight", "output_norm.weight", ones


def vocabulary(size: int) -> list[str]:
    """All bytes, a few merges, the special tokens, and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(left + right for left, right in MERGES), *SPECIAL]
    if size < len(tokens):
        raise ValueError(f"vocabulary: expected at least {len(tokens)} tokens, got {size}")
    return tokens + [f"[PAD{index}]" for index in range(len(tokens), size)]


def write_folder(shape: Shape, folder: Path, dtype: str, seed: int) -> None:
    """A folder that transformers and what reads its folders load."""
    folder.mkdir(parents=True)
    values = {theirs: value for theirs, _, value in tensors(shape, seed)}
    file = str(folder / "model.safetensors")
    if dtype == "float32":
        from safetensors.numpy import save_file

        save_file(values, file, metadata={"format": "pt"})
    else:  # numpy has no bfloat16
        import torch
        from safetensors.torch import save_file

        rounded = {name: torch.from_numpy(v).bfloat16() for name, v in values.items()}
        save_file(rounded, file, metadata={"format": "pt"})
    tokens = vocabulary(shape.vocab)
    end = tokens.index(SPECIAL[-1])
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "bos_token_id": tokens.index(SPECIAL[0]),
        "eos_token_id": end,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[-1],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_gguf(shape: Shape, file: Path, quantization: str, name: str, seed: int) -> None:
    """A file with every matrix quantised, biases and norms in float32."""
    kind, file_type = QUANTIZATIONS[quantization]
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(EPSILON)
    tokens = vocabulary(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(token) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokens.index(SPECIAL[0]))
    writer.add_eos_token_id(tokens.index(SPECIAL[-1]))
    writer.add_pad_token_id(tokens.index(SPECIAL[0]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for _, ggml, value in tensors(shape, seed):
        if value.ndim == 1:
            writer.add_tensor(ggml, value)
        else:
            writer.add_tensor(ggml, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _token_type(token: str) -> gguf.TokenType:
    if token in SPECIAL:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.UNUSED if token.startswith("[PAD") else gguf.TokenType.NORMAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=sorted(QUANTIZATIONS), default="q4_1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"--out: {options.out} is there already; name another folder")
    shape = SHAPES[options.shape]
    write_folder(shape, options.out / "hf", options.dtype, options.seed)
    file = options.out / f"{options.shape}.{options.quantization}.gguf"
    write_gguf(shape, file, options.quantization, options.shape, options.seed)
    print(options.out / "hf", file, sep="\n")


if __name__ == "__main__":
    main()
