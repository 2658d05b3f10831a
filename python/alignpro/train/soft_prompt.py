"""The rows of a soft prompt as what is trained: how they begin, and torch's parameter."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alignpro.config import (
    PreferConfig,
    SelfImproveConfig,
    SftConfig,
    SoftPromptConfig,
    TrainConfig,
)
from alignpro.findings import slow_rows
from alignpro.models.adapter import AdapterWeights, LoraWeights
from alignpro.models.native_model import NativeModel
from alignpro.models.soft_prompt import SoftPrompt, SoftRows
from alignpro.train.policy import Array, LoraPolicy, Policy, Reference, as_parameter

_log = logging.getLogger(__name__)


class SoftPromptPolicy(Policy):
    """The rows of a soft prompt: ``embeddings`` [m, hidden]."""

    def __init__(self, model: NativeModel, weights: SoftPrompt) -> None:
        super().__init__(model)
        if not isinstance(weights, SoftPrompt):
            raise ValueError(f"adapter: expected a SoftPrompt, got {type(weights).__name__}")
        self._layout = replace(weights, base_model_name=model.published_name)
        self.embeddings = as_parameter(weights.rows)

    @classmethod
    def fresh(
        cls, model: NativeModel, config: SoftPromptConfig, separator: str, *, seed: int
    ) -> SoftPromptPolicy:
        """Rows as `initial_rows` has them. separator: of the prompting, before an instruction."""
        return cls(model, initial_soft_prompt(model, config, separator, seed=seed))

    def weights(self) -> SoftPrompt:
        rows = self.embeddings.detach().numpy().copy()
        return replace(self._layout, rows=rows, base_fingerprint=self.model.fingerprint)

    def load_weights(self, weights: SoftPrompt) -> None:
        mine, theirs = self._layout.placed, weights.placed
        if mine != theirs or weights.rows.shape != self._layout.rows.shape:
            raise ValueError(f"adapter: expected {mine}, got {theirs} {weights.rows.shape}")
        with torch.no_grad():
            self.embeddings.copy_(torch.from_numpy(weights.rows))

    @property
    def rows(self) -> SoftRows:
        return self._layout.placed

    def _in_order(self, by_name: Mapping[str, Any]) -> list[Array]:
        return [by_name["rows"]]

    def _arrays(self, weights: SoftPrompt) -> list[Array]:
        return [weights.rows]


def initial_soft_prompt(
    model: NativeModel, config: SoftPromptConfig, separator: str, *, seed: int
) -> SoftPrompt:
    """A fresh soft prompt, at its place. Raises ValueError as `initial_rows`."""
    return SoftPrompt(
        rows=initial_rows(model, config, seed=seed),
        place=config.place,
        separator=separator,
        base_model_name=model.published_name,
        base_fingerprint=model.fingerprint,
    )


def initial_rows(model: NativeModel, config: SoftPromptConfig, *, seed: int) -> Array:
    """[num_tokens, hidden], by ``config.init``, drawn from a generator of its own.

    Random rows are normal with the standard deviation of what is embedded: PEFT's own, of deviation
    1, is far outside of what a model with small embeddings was trained on.

    Raises:
        ValueError: a text without tokens, or more rows than the context holds.
    """
    count, most = config.num_tokens, model.context_length
    if count >= most:
        raise ValueError(
            f"soft_prompt.num_tokens: expected fewer rows than the context of {model.name} holds "
            f"({most} tokens), got {count}"
        )
    table = model.base_table("embed_tokens")
    scale = np.float32(model.config["embedding_scale"])  # rows enter the first layer as they are
    generator = np.random.default_rng(seed)
    if config.init == "random":
        drawn = generator.standard_normal((count, table.shape[1])) * table.std(dtype=np.float64)
        rows: Array = drawn.astype(np.float32) * scale
        return rows
    if config.text is None:
        chosen = generator.choice(len(table), size=count).tolist()
    else:
        tokens = model.tokenizer.encode(config.text)
        if not tokens:
            raise ValueError(f"soft_prompt.init: expected a text with tokens, got {config.init!r}")
        chosen = list(itertools.islice(itertools.cycle(tokens), count))
    rows = table[chosen] * scale
    return rows


def fresh_policy(
    model: NativeModel, config: SftConfig | TrainConfig | PreferConfig
) -> tuple[Policy, Reference]:
    """What a configuration without an adapter to start from trains, and what it is held to: the
    base model, or the rows as they begin, which the reference reads at the same place."""
    if config.tuner == "lora":
        return LoraPolicy.fresh(model, config.lora, seed=config.seed), "base"
    separator = config.prompting.separator
    weights = initial_soft_prompt(model, config.soft_prompt, separator, seed=config.seed)
    return policy_from(model, config, weights)


def policy_from(
    model: NativeModel, config: SftConfig | TrainConfig | PreferConfig, weights: AdapterWeights
) -> tuple[Policy, Reference]:
    """What goes on from an adapter, which is the reference. Raises ValueError for one of the other
    kind than the tuner's."""
    kind = "lora" if isinstance(weights, LoraWeights) else "soft_prompt"
    if kind != config.tuner:
        raise ValueError(f"tuner: expected {kind}, as of the adapter given, got {config.tuner}")
    if isinstance(weights, LoraWeights):
        return LoraPolicy(model, weights), weights
    for finding in slow_rows(config.tuner, config.learning_rate):
        _log.warning(finding.text)
    return SoftPromptPolicy(model, weights), weights


def check_shape(
    config: TrainConfig | PreferConfig | SelfImproveConfig, weights: AdapterWeights
) -> None:
    """Refuse settings of an adapter that the one to go on from does not have."""
    shape: dict[str, Any]
    if isinstance(weights, LoraWeights):
        kind, shape = "lora", {"rank": weights.rank}
    else:
        kind, shape = "soft_prompt", {"num_tokens": len(weights.rows), "place": weights.place}
    if kind != config.tuner:
        return  # `policy_from` says so
    group = getattr(config, kind)
    for name, value in shape.items():
        asked = getattr(group, name)
        if asked not in (value, getattr(type(group)(), name)):
            raise ValueError(
                f"{kind}.{name}: expected {value}, as of the adapter given, or unset, got {asked}"
            )
