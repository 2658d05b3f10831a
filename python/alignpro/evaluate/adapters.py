"""The PEFT folders that a configuration names."""

from __future__ import annotations

from pathlib import Path

from alignpro.models.adapter import LoraWeights, load_peft
from alignpro.models.native_model import NativeModel


def check_adapter(name: str, folder: str | None) -> None:
    """Refuse a folder without an adapter while no model is loaded yet. name: its field.

    Raises:
        FileNotFoundError: there is none.
    """
    if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{name}: {folder}: expected a PEFT folder, got none there")


def load_adapter(folder: str | None, model: NativeModel) -> LoraWeights | None:
    """None is the model without an adapter. Raises as `load_peft`."""
    return None if folder is None else load_peft(Path(folder), model.lora_modules)
