"""The rows and the PEFT folders that a configuration names."""

from __future__ import annotations

from pathlib import Path

from alignpro.config import BoundConfig, EvalConfig, HeadroomConfig, StageConfig
from alignpro.data.load import PromptRow, load_prompts
from alignpro.models.adapter import LoraWeights, load_peft
from alignpro.models.native_model import NativeModel


def load_rows(config: BoundConfig | EvalConfig | HeadroomConfig) -> list[PromptRow]:
    """The first ``num_prompts`` rows. Raises ValueError for fewer of them, or fewer than 2."""
    rows = load_prompts(config.data, split=config.split)
    wanted = max(2, config.num_prompts or 0)
    if wanted > len(rows):
        raise ValueError(f"num_prompts: {config.data} has {len(rows)} rows, {wanted} asked for")
    return rows[: config.num_prompts]


def check_adapters(config: StageConfig, **folders: str | None) -> None:
    """Refuse folders without an adapter while no model is loaded yet: those of prompter and target,
    and ``folders``, by their fields.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = {
        "prompter.adapter": config.prompter.adapter,
        "target.adapter": None if config.target is None else config.target.adapter,
        **folders,
    }
    for name, folder in folders.items():
        if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{name}: {folder}: expected a PEFT folder, got none there")


def load_adapter(folder: str | None, model: NativeModel) -> LoraWeights | None:
    """None is the model without an adapter. Raises as `load_peft`."""
    return None if folder is None else load_peft(Path(folder), model.lora_modules)
