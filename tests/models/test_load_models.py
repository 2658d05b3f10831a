"""Prompter and target of the same model share one engine, whatever the model is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignpro import native
from alignpro.config import ModelConfig
from alignpro.models.native_model import load_model, load_models, wheel_folders


def test_the_same_model_is_one_engine(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir("llama")
    monkeypatch.chdir(folder.parent)
    prompter = ModelConfig(str(folder), adapter="its own")
    for target in (None, str(folder), os.path.join(".", folder.name), f"{folder}{os.sep}"):
        first, same = load_models(prompter, None if target is None else ModelConfig(target))
        assert same is first


def test_another_model_is_another_engine(tiny_model_dir: Callable[..., Path]) -> None:
    prompter, target = load_models(
        ModelConfig(str(tiny_model_dir("llama"))),
        ModelConfig(str(tiny_model_dir("qwen3"))),
        threads=1,
    )
    assert (prompter.config["family"], target.config["family"]) == ("llama", "qwen3")
    assert target.config["threads"] == 1
    with pytest.raises(FileNotFoundError):
        load_models(ModelConfig(str(tiny_model_dir("llama"))), ModelConfig("./nowhere"))


def test_without_cuda_a_device_is_refused_before_anything_is_looked_for():
    cuda = native.core.cuda
    if cuda.is_available():
        pytest.skip(f"{cuda.device_name()} is here")
    with pytest.raises(native.UnavailableError, match=r'^device "cuda": ') as caught:
        load_model("./nowhere", device="cuda")
    assert cuda.unavailable_reason() in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_of_other_arithmetic_is_a_model_of_its_own(smollm2_path):
    prompter, target = load_models(ModelConfig(str(smollm2_path)), ModelConfig(compute="int8"))
    assert target is not prompter
    assert (prompter.config["compute"], target.config["compute"]) == ("float32", "int8")


def test_the_cpu_is_deterministic():
    with pytest.raises(ValueError, match=r"^deterministic: expected true with device cpu"):
        load_model("./nowhere", deterministic=False)


def test_a_group_and_its_options_say_the_same(tiny_model_dir):
    folder = tiny_model_dir("llama")
    for model in (
        load_model(folder, threads=1, kv_dtype="float16", context_length=32),
        load_model(ModelConfig(folder, kv_dtype="float16", context_length=32), 1),
        load_model(ModelConfig(folder, kv_dtype="float16"), 1, context_length=32),
    ):
        assert model.config["kv_dtype"] == "float16" and model.context_length == 32
    with pytest.raises(TypeError, match="mode"):
        load_model(folder, mode="strict")


def test_without_cuda_a_load_says_that(tiny_model_dir):
    if native.core.cuda.is_available():
        pytest.skip(f"{native.core.cuda.device_name()} is here")
    with pytest.raises(native.UnavailableError, match=r"^device cuda: "):
        native.core.Model.load(str(tiny_model_dir("llama")), device="cuda", deterministic=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "tpu"}, 'device: expected "cpu" or "cuda", got "tpu"'),
        ({"compute": "bfloat16"}, 'compute: expected "float32" or "int8", got "bfloat16"'),
        ({"kv_dtype": "int8"}, 'kv_dtype: expected "float32" or "float16", got "int8"'),
        ({"deterministic": False}, "deterministic: device cpu always is, got false"),
        (
            {"device": "cuda", "compute": "int8"},
            'compute: expected "bfloat16" or "float32" on device cuda, got "int8"',
        ),
        (
            {"device": "cuda", "kv_dtype": "float32"},
            'kv_dtype: on device cuda it is compute\'s, "bfloat16", got "float32"',
        ),
    ],
)
def test_what_a_device_does_not_take_is_refused_before_the_file(options, text):
    with pytest.raises(ValueError, match=text):
        native.core.Model.load("./nowhere", **options)


def test_libraries_of_nvidias_wheels_are_found(tmp_path, monkeypatch):
    for name in ("cu99/lib", "cublas/lib", "cublas/include"):
        (tmp_path / "nvidia" / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    mine = [f for f in wheel_folders() if f.startswith(str(tmp_path))]
    assert mine == [str(tmp_path / "nvidia" / name) for name in ("cu99/lib", "cublas/lib")]
