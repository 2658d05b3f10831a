"""The default model against transformers: gguf-py expands the weights, float64 is the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignpro import SamplingParams
from alignpro.models.native_model import NativeModel, load_model

PROMPTS = [
    "What is the capital of France?",
    "Explain how rainbows form, in two sentences.",
    "Écris-moi un poème court — 3 vers, s'il te plaît… 🙂",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nWhat does fib(10) return?",
    "1234567890 + 987 = ",
]


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:
    """LlamaForCausalLM on the same values; q and k rows are put back from GGUF's order."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(str(smollm2_path))
    tensors = {
        t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))).float()
        for t in reader.tensors
    }

    def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, columns = weight.shape
        return (
            weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)
        )

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    names = {
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(30):
        block, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        state[prefix + "self_attn.q_proj.weight"] = unpermuted(tensors[block + "attn_q.weight"], 9)
        state[prefix + "self_attn.k_proj.weight"] = unpermuted(tensors[block + "attn_k.weight"], 3)
        for ours, theirs in names.items():
            state[f"{prefix}{theirs}.weight"] = tensors[f"{block}{ours}.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is in no file
    return model.eval()


def log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def test_log_probabilities_and_greedy_tokens(smollm2: NativeModel, oracle: Any) -> None:
    greedy = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
    sequences = [c.prompt_tokens + c.tokens for c in smollm2.generate(PROMPTS, greedy)]
    ours = smollm2.score(sequences)
    plain = [log_probabilities(oracle, tokens) for tokens in sequences]
    with torch.no_grad():
        for tokens in sequences:  # every greedy token is the oracle's, too
            best = oracle(torch.tensor([tokens])).logits[0, :-1].argmax(-1).tolist()
            assert best[-16:] == tokens[-16:]
    truth = [log_probabilities(oracle.double(), tokens) for tokens in sequences]
    oracle.float()
    ours_error = np.linalg.norm(np.concatenate(ours) - np.concatenate(truth))
    plain_error = np.linalg.norm(np.concatenate(plain) - np.concatenate(truth))
    # The error budget: at most twice as far from float64 as plain PyTorch in float32.
    assert ours_error <= 2 * plain_error, (ours_error, plain_error)


def test_bits_depend_on_the_request_alone(smollm2: NativeModel, smollm2_path: Path) -> None:
    params = [
        SamplingParams(max_new_tokens=8, seed=i, temperature=(0.7, 1.0, 1.3)[i % 3])
        for i in range(64)
    ]
    prompts = [f"{PROMPTS[i % len(PROMPTS)]} ({i})" for i in range(64)]
    together = smollm2.generate(prompts, params)
    backwards = smollm2.generate(prompts[::-1], params[::-1])[::-1]
    cold = load_model(smollm2_path, threads=1, prefix_cache=False, max_batch_rows=7)
    for i, completion in enumerate(together):
        alone = [backwards[i]]
        if i % 8 == 0:  # one thread, odd chunks, nothing shared: slow, so some of them
            alone.extend(cold.generate([prompts[i]], params[i]))
            alone.extend(smollm2.generate([prompts[i]], params[i]))
        for other in alone:
            assert other.tokens == completion.tokens
            assert other.logprobs == completion.logprobs
    for i in (0, 1, 2):  # and the scorer agrees with the sampler at each temperature
        tokens, start = (
            together[i].prompt_tokens + together[i].tokens,
            len(together[i].prompt_tokens),
        )
        (scored,) = smollm2.score([tokens], temperature=params[i].temperature)
        assert scored[start - 1 :].tolist() == together[i].logprobs
