"""Folders as they lie on disks: each loads as transformers loads it, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignpro.models.native_model import load_model
from alignpro.native import ModelFileError

IDS = [5 + i % 90 for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Path]:
    def copy(family: str = "qwen2", *, tied: bool = False, **config: Any) -> Path:
        made = tmp_path / "model"
        shutil.copytree(tiny_model_dir(family, tied=tied), made, dirs_exist_ok=True)
        path = made / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
        return made

    return copy


def scores(path: Path) -> np.ndarray:
    return load_model(path, threads=1).score([IDS])[0]


def oracle(path: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].double()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(IDS[1:])[:, None])
    return chosen[:, 0].numpy()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return tensors


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4} | YARN},
    "yarn, as before transformers 5": {
        "rope_parameters": None,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn"} | YARN,
    },
    "yarn with all it takes": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 8, "beta_slow": 2,
                            "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5} | YARN
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_positions_are_scaled_as_by_transformers(folder: Callable[..., Path], name: str) -> None:
    path = folder(**ROPES[name])
    plain = scores(folder(rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    path = folder(**ROPES[name])
    assert np.abs(scores(path) - oracle(path)).max() < 1e-4
    assert name == "dynamic" or np.abs(scores(path) - plain).max() > 1e-3


def test_a_head_of_its_own_beside_a_tied_config(
    folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(tied=True)
    tied = scores(path)
    assert not caplog.records
    draw = np.random.default_rng(1)

    def add_head(tensors: dict[str, Any]) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table + draw.normal(size=table.shape).astype(np.float32)

    edit(path, add_head)
    assert np.abs(scores(path) - oracle(path)).max() < 1e-4
    assert np.abs(scores(path) - tied).max() > 1e-2
    assert "tie_word_embeddings" in caplog.text


def test_what_lies_beside_the_weights_that_count(folder: Callable[..., Path]) -> None:
    path = folder()
    want = scores(path)
    tensors = load_file(path / "model.safetensors")
    other = {name: value + 1 for name, value in tensors.items()}
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    np.testing.assert_array_equal(scores(path), want)  # the index of a build that is gone
    save_file(other, path / "model-00001-of-00001.safetensors")
    np.testing.assert_array_equal(scores(path), want)  # an older build is there as well
    np.testing.assert_allclose(oracle(path), want, atol=1e-4)
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    save_file(
        {"tok_embeddings.weight": np.ones((2, 2), np.float32)}, path / "consolidated.safetensors"
    )
    np.testing.assert_array_equal(scores(path), want)  # Mistral's second copy


@pytest.mark.parametrize(
    "quantization", [{}, {"quant_method": "bitsandbytes", "load_in_4bit": True}]
)
def test_a_note_of_quantisation_on_plain_weights(
    folder: Callable[..., Path], quantization: dict[str, Any]
) -> None:
    want = scores(folder())
    np.testing.assert_array_equal(scores(folder(quantization_config=quantization)), want)


def test_attention_to_both_sides_is_refused(folder: Callable[..., Path]) -> None:
    assert scores(folder(is_causal=True)).size
    with pytest.raises(ModelFileError, match=r"config\.json: .*\(is_causal\) is not supported"):
        load_model(folder(is_causal=False), threads=1)


def test_pickled_weights_are_named(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"found none; pytorch_model\.bin is a pickle"):
        load_model(path, threads=1)


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_a_gguf_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=f"expected a model, .*general.type is '{kind}'"):
        load_model(tmp_path / "x.gguf", threads=1)


def test_quantised_weights_are_refused(folder: Callable[..., Path]) -> None:
    path = folder(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    name = "model.layers.0.mlp.down_proj.weight"
    edit(path, lambda t: t.update({name: np.zeros((2400, 1), np.uint8)}))
    with pytest.raises(ModelFileError, match=r"has dtype U8.*use the original folder or a GGUF"):
        load_model(path, threads=1)
