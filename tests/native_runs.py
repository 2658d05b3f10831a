"""What tests of the native model share: short requests, random adapters, running to the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignpro.models.adapter import LoraWeights
from alignpro.models.native_client import NativeClient
from alignpro.models.native_model import NativeModel
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


def drain(client: NativeClient) -> list[Any]:
    done: list[Any] = []
    while not client.idle():
        done += client.step()
    return done


def assert_settles(model: NativeModel, steps: int = 2) -> None:
    """Nothing is left in the engine after so many steps, and its blocks are free."""
    for _ in range(steps):
        model._engine.step()
    assert model._engine.idle()
    assert model.stats()["kv_blocks_in_use"] == 0
