"""SmolLM3 as GGUF: no key names the layers without rope; q and k are permuted as Llama's."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from alignpro.models.native_model import load_model
from conftest import save_tiny_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A head's halves side by side -> lane by lane, as llama.cpp's converter stores q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(str(file), "smollm3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 5 else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_eos_token_id(2)
    for name, value in load_file(folder / "model.safetensors").items():
        if name in _OUTSIDE:
            writer.add_tensor(_OUTSIDE[name], value)
            continue
        _, _, layer, *rest = name.removesuffix(".weight").split(".")
        part = ".".join(rest)
        if part == "self_attn.q_proj":
            value = permuted(value, config["num_attention_heads"])
        elif part == "self_attn.k_proj":
            value = permuted(value, config["num_key_value_heads"])
        writer.add_tensor(f"blk.{layer}.{_NAMES[part]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_gives_what_its_folder_gives(tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.SmolLM3Config(
        vocab_size=111,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(5)
    oracle = transformers.SmolLM3ForCausalLM(config).double()
    oracle.float().save_pretrained(tmp_path / "folder")
    save_tiny_tokenizer(tmp_path / "folder")
    folder = load_model(tmp_path / "folder")
    file = load_model(write_gguf(tmp_path / "smollm3.gguf", tmp_path / "folder"))
    ids = np.random.default_rng(3).integers(5, 111, 40).tolist()
    scores = folder.score([ids])[0]
    np.testing.assert_array_equal(file.score([ids])[0], scores)
    with torch.no_grad():
        logits = oracle.double()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    np.testing.assert_allclose(scores, expected.numpy(), atol=2e-5)
    assert folder.tokenizer.encode("the rain") == file.tokenizer.encode("the rain")
