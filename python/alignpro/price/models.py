"""A model as a price sees it: what its files say, or what its makers published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignpro.config import ModelConfig
from alignpro.models.resolve import find_model
from alignpro.models.tokenizer import Tokenizer
from alignpro.native import core

# The config.json of each, as on the hub, in a folder named ORGANISATION--MODEL. Of Phi-3.5 without
# its rope factors, which change no size.
_PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class PricedModel:
    """A model's facts, and the bytes of its matrices where it is to run."""

    name: str
    facts: core.ModelFacts
    storage: str  # "GGUF", "safetensors" or a type: the form of the weights
    source: str  # "files" or "published"
    files: core.ModelFiles | None = None  # None: they are not here
    matrix_bytes: Mapping[str, int] = field(default_factory=dict)  # layers, head, embedding

    def held(self, device: str, compute: str) -> PricedModel:
        """The same on a device: on the CPU as stored, or in the types of int8 products."""
        storage = self.storage if (device, compute) == ("cpu", "float32") else compute
        held = self.facts.matrix_bytes(device, compute)
        return replace(self, matrix_bytes=held, storage=storage)

    @property
    def parameters(self) -> int:
        """Of all matrices; norms and biases are a ten-thousandth of them."""
        tables = 1 if self.facts.config["tied_head"] else 2
        return self.facts.layer_parameters + tables * self.facts.head_parameters

    @property
    def weight_bytes(self) -> int:
        return sum(self.matrix_bytes.values())

    @property
    def streamed_bytes(self) -> int:
        """What a step reads however few rows it has: layers and head, not the embedding."""
        return self.matrix_bytes["layers"] + self.matrix_bytes["head"]

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "layer_parameters": self.facts.layer_parameters,
            "weight_bytes": self.weight_bytes,
            "storage": self.storage,
            "source": self.source,
        }

    def tokenizer(self, config: ModelConfig) -> Tokenizer | None:
        """With the chat template of ``config``."""
        if self.files is None:
            return None
        plain = Tokenizer.of(self.files)
        return plain.with_template(config.chat_template, config.chat_template_kwargs)


def find_priced(name: str) -> PricedModel:
    """The model, from files that are here or from what was published; nothing is fetched."""
    path = find_model(name)
    if path is not None:
        storage = "GGUF" if path.is_file() else "safetensors"
        files = core.ModelFiles(str(path))
        return PricedModel(name, core.describe(files), storage, "files", files)
    published = {d.name.replace("--", "/"): d for d in sorted(_PUBLISHED.iterdir())}
    if name not in published:
        raise FileNotFoundError(
            f"model {name!r}: not on this machine, and not among those whose sizes are known "
            f"({', '.join(published)}); name a path, or fetch it first"
        )
    return PricedModel(name, core.describe(str(published[name])), "bfloat16", "published")
