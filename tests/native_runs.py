"""What tests of the native model share: short requests, random adapters, running to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import alignpro
from alignpro import native
from alignpro.config import REWRITE, to_mapping
from alignpro.models.adapter import LoraWeights, save_peft
from alignpro.models.arguments import core_params
from alignpro.models.native_client import NativeClient
from alignpro.models.native_model import NativeModel, load_model
from alignpro.run_directory import open_run_dir
from alignpro.types import SamplingParams

CHAT = [{"role": "user", "content": "hello there"}]
SHORT = SamplingParams(max_new_tokens=12, seed=3, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=200, seed=3, ignore_eos=True)


def lora(model: NativeModel, seed: int = 0, modules: int | None = None) -> LoraWeights:
    draw = np.random.default_rng(seed)
    chosen = list(model.lora_modules.items())[:modules]
    return LoraWeights(
        rank=2,
        alpha=4.0,
        rslora=False,
        matrices={
            name: (
                draw.normal(size=(2, inputs)).astype(np.float32) / inputs**0.5,
                draw.normal(size=(outputs, 2)).astype(np.float32),
            )
            for name, (outputs, inputs) in chosen
        },
    )


def save_run(folder: Path, base: Path, new_tokens: int, **fields: Any) -> Path:
    """The directory of a run, as training leaves it behind."""
    config = alignpro.TrainConfig(
        prompter=alignpro.ModelConfig(str(base)),
        run_dir=str(folder),
        rewrite=replace(REWRITE, max_new_tokens=new_tokens),
        prompting=alignpro.Prompting(template="{prompt}", separator=" | "),
        **fields,
    )
    with open_run_dir(folder):
        (folder / "config.json").write_text(json.dumps(to_mapping(config)))
        save_peft(folder / "adapter", lora(load_model(base, threads=1)))
    return folder


def drain(client: NativeClient) -> list[Any]:
    done: list[Any] = []
    while not client.idle():
        done += client.step()
    return done


def draw_ids(
    model: NativeModel, prompts: list[list[int]], params: SamplingParams, adapter: Any = None
) -> list[Any]:
    """The engine's own sequences, run to their end; ids below 0 are rows of the adapter."""
    client = native.core.Client(model._engine)
    given = core_params(params, sample=0)
    drawn = [client.submit(prompt, given, adapter) for prompt in prompts]
    client.run()
    for sequence in drawn:
        sequence.raise_error()
    return drawn


def assert_settles(model: NativeModel, steps: int = 2) -> None:
    """Nothing is left in the engine after so many steps, and its blocks are free."""
    for _ in range(steps):
        model._engine.step()
    assert model._engine.idle()
    assert model.stats()["kv_blocks_in_use"] == 0
