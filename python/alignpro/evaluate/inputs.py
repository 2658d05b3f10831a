"""The rows and the PEFT folders that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro import fingerprints
from alignpro.config import BoundConfig, EvalConfig, HeadroomConfig, StageConfig
from alignpro.config.fields import count_of
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.models.adapter import AdapterWeights
from alignpro.models.adapter_files import adapter_folder, is_mixture
from alignpro.models.language_model import ChatModel
from alignpro.models.mixture import Mixture, load_writer, read_mixture
from alignpro.models.native_model import NativeModel
from alignpro.models.soft_prompt import SoftPrompt
from alignpro.rewards.check import shorten
from alignpro.types import Conversation, Reward


def load_rows(config: BoundConfig | EvalConfig | HeadroomConfig) -> list[PromptRow]:
    """The first ``num_prompts`` rows. Raises ValueError for fewer of them, or fewer than 2."""
    rows = load_prompts(config.data)
    return rows[: count_of(config, len(rows), config.data.path)]


def instructions_by_label(config: EvalConfig, rows: Sequence[PromptRow]) -> list[str] | None:
    """What the labelled arm puts behind each row's prompt; None without that arm.

    Raises:
        ValueError: a row without a label, or a label without an instruction; it names the row.
    """
    if config.labelled is None:
        return None
    column, instructions = config.labelled.column, config.labelled.instructions
    texts = []
    for row in rows:
        turn = shorten(Conversation.of(row.prompt).last_turn)
        where = f"labelled: {row.place} ({turn})"
        label = row.columns.get(column)
        if label is None:
            there = sorted(row.columns) or "no other column than the prompt"
            raise ValueError(f"{where}: expected a label in column {column!r}; there are {there}")
        text = label if instructions is None else instructions.get(str(label))
        if text is None:
            raise ValueError(
                f"{where}: {column} {label!r} has no instruction; labelled.instructions has "
                f"{sorted(instructions or ())}"
            )
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected text in column {column!r}, got {text!r}")
        texts.append(text.strip())
    return texts


def check_adapters(config: StageConfig, **folders: str | None) -> None:
    """Refuse folders without an adapter while no model is loaded yet: those of prompter and target,
    and ``folders``, by their fields.

    Raises:
        FileNotFoundError: there is none. ValueError: a mixture that is none.
    """
    folders = {
        "prompter.adapter": config.prompter.adapter,
        "target.adapter": None if config.target is None else config.target.adapter,
        **folders,
    }
    for name, folder in folders.items():
        try:
            _ = folder is None or adapter_folder(folder)
            _ = folder is None or not is_mixture(folder) or read_mixture(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def load_adapter(folder: str | None, model: NativeModel) -> AdapterWeights | Mixture | None:
    """None is the model without an adapter. As `models.mixture.load_writer`."""
    return None if folder is None else load_writer(model, folder)


def load_soft_prompt(folder: str | None, model: NativeModel) -> SoftPrompt | None:
    """Raises ValueError for another adapter, and as `load_adapter`."""
    weights = load_adapter(folder, model)
    if weights is not None and not isinstance(weights, SoftPrompt):
        kind = "a mixture" if isinstance(weights, Mixture) else "LoRA matrices, which tuned takes"
        raise ValueError(f"soft: {folder}: expected a soft prompt, got {kind}")
    return weights


def made_from_of(
    config: StageConfig,
    prompter: NativeModel | None,
    target: NativeModel | ChatModel,
    reward: Reward,
    rows: Sequence[PromptRow],
) -> fingerprints.Fingerprints:
    """What every arm is made from. prompter: None where none takes part."""
    found = fingerprints.of_models(prompter, target) | fingerprints.of_reward(reward)
    prompts = [row.prompt for row in rows]
    found["data"] = fingerprints.of_rows(str(config.data.path), prompts, stack_columns(rows))
    if config.target is not None and config.target.adapter is not None:
        found["adapter of the target"] = fingerprints.of_adapter_folder(config.target.adapter)
    return found
