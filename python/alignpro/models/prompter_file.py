"""prompter.json beside an adapter: what the C++ prompter, which has no jinja, reads prompts by."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from alignpro.config import Prompting
from alignpro.files import write_json
from alignpro.models.adapter import AdapterWeights, save_peft
from alignpro.models.soft_prompt import SoftPrompt
from alignpro.models.tokenizer import Tokenizer
from alignpro.types import SamplingParams

_log = logging.getLogger(__name__)

_FILE = "prompter.json"
_SET_FOR_EACH = ("n", "seed", "deadline_seconds")
_PROMPTING = ("mode", "template", "separator", "history", "history_template", "history_cut")


def save_prompter(
    folder: Path,
    weights: AdapterWeights,
    tokenizer: Tokenizer,
    prompting: Prompting,
    params: SamplingParams,
) -> None:
    """Write a prompter's adapter, and how it reads and writes prompts. Where the chat template
    changes the text of a turn, or the target has a template of its own, and for a soft prompt,
    there is no such file, and a warning. Raises as `save_peft`."""
    try:
        if isinstance(weights, SoftPrompt):
            raise ValueError("it reads LoRA adapters, and this one is a soft prompt")
        if prompting.target_template != "{prompt}":
            raise ValueError("its target reads prompts in a target_template")
        before, after, strips = tokenizer.around_turn()
    except ValueError as error:
        (folder / _FILE).unlink(missing_ok=True)
        _log.warning("%s is not written, which the C++ prompter reads: %s", folder / _FILE, error)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        sampling = {k: v for k, v in asdict(params).items() if k not in _SET_FOR_EACH}
        write_json(
            folder / _FILE,
            {
                "chat": {"before": before, "after": after, "strips": strips},
                "prompting": {name: getattr(prompting, name) for name in _PROMPTING},
                "sampling": sampling,
            },
        )
    save_peft(folder, weights)
