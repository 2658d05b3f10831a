"""A tiny model that writes a given text: layers that add nothing, so that a token leads to the next
one. It runs in the real engine, with a tokenizer that has "<think>" and "</think>"."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

TAGS = {"~": "<think>", "`": "</think>"}  # which the tokenizer has instead of these characters
CHATML = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}<|user|>{{ c }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>:"
    "{% elif force_thinking is defined and force_thinking %}<think>{% endif %}{% endif %}"
)


def scripted_model(folder: Path, base: Path, chains: list[list[str]]) -> Path:
    """A copy of the model in ``base`` that goes on from the first token of a chain to its others,
    each of which stands in one place of one chain, but for a last one, which may end several."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = spec["model"]["vocab"]
    for char, tag in TAGS.items():
        token = vocab[tag] = vocab.pop(char)
        flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
        spec["added_tokens"].append({"id": token, "content": tag, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")

    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    embedding /= embedding.pow(2).mean(1, keepdim=True).sqrt()
    head = embedding.new_zeros(embedding.shape)
    for chain in chains:
        for before, after in itertools.pairwise(chain):
            head[vocab[after]] += embedding[vocab[before]]
    for name, value in weights.items():
        if "o_proj" in name or "down_proj" in name:
            value.zero_()
        elif "norm" in name:
            value.fill_(1.0)
    weights["lm_head.weight"] = head
    save_file(weights, file, metadata={"format": "pt"})
    return folder
