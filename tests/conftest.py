"""Fixtures that several rooms share: the default model, and a tiny random model of every family."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FAMILIES = (
    *("llama", "llama3", "mistral", "qwen2", "qwen3"),
    *("phi3", "phi3-longrope", "smollm3", "gemma3"),
)

TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """Of a shell's background job SIGINT is ignored, and of nohup's SIGHUP."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        ours = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, ours)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    from alignpro.models.resolve import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Any:
    from alignpro.models.native_model import load_model

    return load_model(smollm2_path)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_dir(family, tied=False)``: a random model in Hugging Face's layout, made
    once. Sizes are awkward on purpose: few are multiples of 8.

    Families: those of ``FAMILIES``; "llama3" is Llama with Llama 3's rope scaling.
    """
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, *, tied: bool = False) -> Path:
        if (family, tied) not in made:
            name = f"tiny-{family}-{'tied' if tied else 'untied'}"
            folder = tmp_path_factory.mktemp(name, numbered=False)
            _save_tiny_model(folder, family, tied)
            save_tiny_tokenizer(folder)
            made[family, tied] = folder
        return made[family, tied]

    return make


def save_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 111 tokens: printable ASCII, a few merges, five special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = [chr(c) for c in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    merges = [
        ("h", "e"), ("i", "n"), ("r", "e"), ("Ġ", "t"), ("Ġ", "a"),
        ("o", "n"), ("e", "r"), ("a", "t"), ("o", "r"), ("Ġt", "he"),
    ]  # fmt: skip
    tokens = special + alphabet + [left + right for left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TINY_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _save_tiny_model(folder: Path, family: str, tied: bool) -> None:
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 111,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "llama":
        config: Any = transformers.LlamaConfig(**sizes)
    elif family == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    elif family == "mistral":
        config = transformers.MistralConfig(**sizes, head_dim=16, sliding_window=None)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**sizes)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**sizes, head_dim=16)
    elif family == "phi3":
        config = transformers.Phi3Config(**sizes, sliding_window=None)
    elif family == "smollm3":
        config = transformers.SmolLM3Config(**sizes, no_rope_layer_interval=2)
    elif family == "gemma3":  # a global layer between local ones, and a scale of its own
        rope = {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        config = transformers.Gemma3TextConfig(
            **sizes,
            head_dim=16,
            query_pre_attn_scalar=20,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=rope,
        )
    elif family == "phi3-longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
            "long_factor": [1.0, 1.3, 1.9, 2.8, 4.0, 6.0],
            "original_max_position_embeddings": 64,
        }
        longrope = {**sizes, "original_max_position_embeddings": 64}
        config = transformers.Phi3Config(**longrope, rope_parameters=rope, sliding_window=None)
    else:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family}")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, tied)
    model.save_pretrained(folder)


def randomise(model: Any, tied: bool) -> None:
    """Weights of a trained model's scale: a fresh one's softmax is flat and hides mistakes."""
    import torch

    generator = torch.Generator().manual_seed(20250101)
    norm = 0.0 if type(model).__name__.startswith("Gemma3") else 1.0  # what it adds to 1

    def normal(parameter: Any, mean: float, deviation: float) -> None:
        parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                normal(parameter, norm, 0.1)
            elif parameter.ndim == 1:  # bias
                normal(parameter, 0.0, 0.2)
            elif "lm_head" in name or (tied and "embed" in name):
                normal(parameter, 0.0, 3.0 / parameter.shape[1] ** 0.5)
            elif "embed" in name:
                normal(parameter, 0.0, 1.0)
            else:
                normal(parameter, 0.0, 1.0 / parameter.shape[1] ** 0.5)
