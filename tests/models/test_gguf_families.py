"""SmolLM3 and Gemma 3 as GGUF: what files leave out, and what llama.cpp's converter changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from alignpro.models.native_model import load_model
from alignpro.native import ModelFileError
from conftest import randomise, save_tiny_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
SIZES = {
    "vocab_size": 111,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A head's halves side by side -> lane by lane, as llama.cpp's converter stores q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def converted(name: str, value: np.ndarray, arch: str, config: dict[str, Any]) -> np.ndarray:
    if arch == "gemma3":  # its norms hold what is added to 1
        return value + 1 if "norm" in name else value
    if name.endswith("q_proj.weight"):
        return permuted(value, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return permuted(value, config["num_key_value_heads"])
    return value


def write_gguf(file: Path, folder: Path, arch: str, keys: dict[str, float] | None = None) -> Path:
    """keys: others of the architecture; whole numbers as integers."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == "gemma3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    for key, number in (keys or {}).items():
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"{arch}.{key}", number)
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 5 else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_eos_token_id(2)
    names = _GEMMA_NAMES if arch == "gemma3" else _NAMES
    for name, value in load_file(folder / "model.safetensors").items():
        to = _OUTSIDE.get(name)
        if to is None:
            _, _, layer, *rest = name.removesuffix(".weight").split(".")
            to = f"blk.{layer}.{names['.'.join(rest)]}.weight"
        writer.add_tensor(to, converted(name, value, arch, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def scored_by_transformers(oracle: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of ids[1:], in float64."""
    import torch

    with torch.no_grad():
        logits = oracle.double()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found: np.ndarray = logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()
    return found


def gemma_config(**changes: Any) -> Any:
    """Seven layers, of which the sixth is global; a window far shorter than the texts."""
    import transformers

    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    given = {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16}
    return transformers.Gemma3TextConfig(
        **{**SIZES, **given, "sliding_window": 8, "rope_parameters": rope, **changes}
    )


def tiny_oracle(arch: str, folder: Path, **changes: Any) -> Any:
    """transformers' model, saved."""
    import torch
    import transformers

    torch.manual_seed(5)
    if arch == "gemma3":
        oracle: Any = transformers.Gemma3ForCausalLM(gemma_config(**changes))
        randomise(oracle, tied=True)
    else:
        config = transformers.SmolLM3Config(**SIZES, num_hidden_layers=5)
        oracle = transformers.SmolLM3ForCausalLM(config)
    oracle.float().save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return oracle


# Of the Gemma of 62 layers the scale of the scores goes by width and heads, not by head_dim.
@pytest.mark.parametrize(
    ("arch", "changes", "keys"),
    [
        ("smollm3", {}, {}),
        ("gemma3", {}, {}),
        (
            "gemma3",
            {"layer_types": [f"{'full' if i % 3 == 2 else 'sliding'}_attention" for i in range(7)]},
            {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 1e4},
        ),
        ("gemma3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 12}, {}),
    ],
    ids=["smollm3", "gemma3", "gemma3-pattern", "gemma3-27b"],
)
def test_a_gguf_file_gives_what_its_folder_gives(
    tmp_path: Path, arch: str, changes: dict[str, Any], keys: dict[str, float]
) -> None:
    oracle = tiny_oracle(arch, tmp_path / "folder", **changes)
    folder = load_model(tmp_path / "folder")
    file = load_model(write_gguf(tmp_path / "model.gguf", tmp_path / "folder", arch, keys))
    ids = np.random.default_rng(3).integers(5, 111, 40).tolist()
    scores = folder.score([ids])[0]
    np.testing.assert_array_equal(file.score([ids])[0], scores)
    atol = 2e-4 if "num_hidden_layers" in changes else 2e-5  # roundings of so many layers
    np.testing.assert_allclose(scores, scored_by_transformers(oracle, ids), atol=atol)
    assert folder.tokenizer.encode("the rain") == file.tokenizer.encode("the rain")


def test_what_gemma_files_may_not_ask_for(tmp_path: Path) -> None:
    tiny_oracle("gemma3", tmp_path / "folder")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        file = write_gguf(tmp_path / f"{key}.gguf", tmp_path / "folder", "gemma3", {key: 30.0})
        with pytest.raises(ModelFileError, match=rf"metadata key 'gemma3\.{key}' is not supported"):
            load_model(file)
