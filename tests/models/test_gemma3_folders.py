"""Gemma 3's folders: the embedding's scale, and the text part of what has an encoder of images."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignpro.models.native_model import load_model
from alignpro.native import ModelFileError
from conftest import randomise, save_tiny_tokenizer
from models.test_gguf_families import gemma_config, scored_by_transformers


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_gemmas_embedding_is_scaled_in_the_type_that_it_is_stored_in(
    tmp_path: Path, stored: str
) -> None:
    """As transformers scales it in a model of that type: by 6.9375 for sqrt(48) in bfloat16."""
    import torch
    import transformers

    dtype = getattr(torch, stored)
    torch.manual_seed(5)
    saved: Any = transformers.Gemma3ForCausalLM(gemma_config())
    randomise(saved, tied=True)
    saved.to(dtype).save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    embedding, scale = oracle.model.embed_tokens, torch.tensor(48.0).sqrt()
    seven = torch.tensor([7])
    with torch.no_grad():  # of a power of two: nothing else is rounded
        saved.model.embed_tokens.weight[7] = 0.5
        assert (saved.model.embed_tokens(seven) == 0.5 * scale.to(dtype)).all()
    embedding.embed_scale = scale.to(dtype).double()
    model = load_model(tmp_path)
    assert model.config["embedding_scale"] == embedding.embed_scale.item()
    ids = np.random.default_rng(3).integers(5, 111, 40).tolist()
    expected = scored_by_transformers(oracle, ids)
    np.testing.assert_allclose(model.score([ids])[0], expected, atol=5e-5)
    if stored == "bfloat16":  # which shows
        embedding.embed_scale = scale.double()
        assert np.abs(scored_by_transformers(oracle, ids) - expected).max() > 1e-3


@pytest.mark.parametrize("published", [False, True], ids=["transformers 5", "hub"])
def test_the_text_part_of_a_folder_with_an_encoder_of_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, published: bool
) -> None:
    """Under the names that transformers 5 has in memory, and those of published files."""
    import torch
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(5)
    config = transformers.Gemma3Config(
        text_config=gemma_config(), vision_config=vision, mm_tokens_per_image=4
    )
    oracle: Any = transformers.Gemma3ForConditionalGeneration(config).float()
    randomise(oracle, tied=True)
    oracle.save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        bare = name.removeprefix("model.").replace("language_model.model.", "language_model.")
        if published:
            bare = bare.replace("language_model.", "language_model.model.")
        tensors[bare if published else f"model.{bare}"] = value
    save_file(tensors, file, {"format": "pt"})
    assert any("vision_tower." in name for name in tensors)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path)
    assert "its encoder of images is left out" in caplog.text
    ids = np.random.default_rng(3).integers(5, 111, 40).tolist()
    expected = scored_by_transformers(oracle, ids)
    np.testing.assert_allclose(model.score([ids])[0], expected, atol=2e-5)
    assert "model.layers.6.self_attn.q_proj" in model.lora_modules
    described = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del described["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(ModelFileError, match='text_config: "model_type" must be a string, it is m'):
        load_model(tmp_path)
