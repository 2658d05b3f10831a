"""Tiny models of every family, and of what else changes the arithmetic of a forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    family: str  # as in ``tiny_model_dir``
    tied: bool = False
    window: int | None = None  # of attention
    context: int | None = None  # longer than the pre-training's: longrope takes its long factors


VARIANTS = {
    "llama": Variant("llama"),
    "llama-tied": Variant("llama", tied=True),
    "llama3": Variant("llama3"),
    "mistral": Variant("mistral"),
    "mistral-window": Variant("mistral", window=9),
    "qwen2": Variant("qwen2"),
    "qwen3": Variant("qwen3"),
    "phi3": Variant("phi3"),
    "phi3-longrope": Variant("phi3-longrope"),
    "smollm3": Variant("smollm3"),
    "gemma3": Variant("gemma3"),
    "gemma3-tied": Variant("gemma3", tied=True),
    "phi3-longrope-long": Variant("phi3-longrope", context=256),
}


def variant_folder(variant: Variant, tiny_model_dir: Callable[..., Path], root: Path) -> Path:
    """The model's folder; with a window, a copy under ``root``."""
    folder = tiny_model_dir(variant.family, tied=variant.tied)
    if variant.window is None:
        return folder
    copy = root / f"{folder.name}-window-{variant.window}"
    if not copy.exists():
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text("utf-8"))
        config["sliding_window"] = variant.window
        (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy
