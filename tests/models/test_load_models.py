"""Prompter and target of the same model share one engine, whatever the model is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignpro import native
from alignpro.models.native_model import load_model, load_models


def test_the_same_model_is_one_engine(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir("llama")
    monkeypatch.chdir(folder.parent)
    for target in (None, str(folder), os.path.join(".", folder.name), f"{folder}{os.sep}"):
        prompter, same = load_models(str(folder), target)
        assert same is prompter


def test_another_model_is_another_engine(tiny_model_dir: Callable[..., Path]) -> None:
    prompter, target = load_models(
        str(tiny_model_dir("llama")), str(tiny_model_dir("qwen3")), threads=1
    )
    assert (prompter.config["family"], target.config["family"]) == ("llama", "qwen3")
    assert target.config["threads"] == 1
    with pytest.raises(FileNotFoundError):
        load_models(str(tiny_model_dir("llama")), "./nowhere")


def test_without_cuda_a_device_is_refused_before_anything_is_looked_for():
    cuda = native.core.cuda
    if cuda.is_available():
        pytest.skip(f"{cuda.device_name()} is here")
    with pytest.raises(native.UnavailableError, match=r'^device "cuda": ') as caught:
        load_model("./nowhere", device="cuda")
    assert cuda.unavailable_reason() in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_of_other_arithmetic_is_a_model_of_its_own(smollm2_path):
    prompter, target = load_models(smollm2_path, None, target_compute="int8")
    assert target is not prompter
    assert (prompter.config["compute"], target.config["compute"]) == ("float32", "int8")
