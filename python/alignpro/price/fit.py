"""The memory of a fit to pairs: `alignpro sft --dry-run`, and of `prefer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.bench.machine import available_bytes
from alignpro.config import ModelConfig, PreferConfig, SftConfig
from alignpro.data.load import is_local, load_pairs
from alignpro.data.preferences import load_preferences
from alignpro.models.tokenizer import Tokenizer
from alignpro.price.estimate import lora_bytes, process_bytes
from alignpro.price.models import PricedModel, find_priced
from alignpro.price.work import lora_parameters, score_bytes
from alignpro.train.micro_batches import Activations, fit_micro_batches
from alignpro.train.preference import encode_preference, fit_preferences
from alignpro.train.schedule import batch_indices
from alignpro.train.sft import Example, encode_pairs, end_of_turn, fit_pairs, record_pairs


@dataclass(frozen=True)
class _Reads:
    """See `language_model.Reads`."""

    name: str
    tokenizer: Tokenizer
    context_length: int


def price_fit(config: SftConfig | PreferConfig) -> dict[str, Any]:
    """What the fit holds in memory at most, as plain values, by the pairs of every step; no weights
    are loaded and nothing is fetched.

    Raises ValueError: data or a model that is not on this machine, a device or tuner that is not
    priced, and what the fit itself refuses of its pairs.
    """
    trained = config.trained if isinstance(config, PreferConfig) else config.prompter
    if trained.device != "cpu" or config.tuner != "lora":
        raise ValueError(
            f"--dry-run: expected device cpu and tuner lora, got {trained.device} and "
            f"{config.tuner}, which are not priced"
        )
    if not is_local(config.data):
        raise ValueError(f"--dry-run: {config.data.path} is not on this machine; fetch it first")
    model = find_priced(trained.name).held("cpu", trained.resolved_compute)
    pairs = _pairs(config, trained, model)

    def bytes_of(some: Sequence[Sequence[int]], begins: Sequence[int], mode: Activations) -> int:
        options = {"sequences": some, "starts": begins, "activations": mode}
        return score_bytes(model, config, config.threads, **options)

    held: list[tuple[int, int]] = [(0, 0)]  # by the policy, and under the reference meanwhile
    micro_batches = 0
    for step in range(config.steps):
        size = config.batch_size
        chosen = batch_indices(seed=config.seed, cursor=step * size, count=size, rows=len(pairs))
        examples = [example for index in chosen for example in pairs[index]]
        sequences, starts = [e.tokens for e in examples], [e.start for e in examples]
        plan = fit_micro_batches(sequences, starts, config, bytes_of, together=len(pairs[0]))
        micro_batches = max(micro_batches, len(plan))
        for micro in plan:
            part, begins = micro.of(sequences), micro.of(starts)
            other = bytes_of(part, begins, "recompute") if isinstance(config, PreferConfig) else 0
            held.append((bytes_of(part, begins, micro.activations), other))
    score, reference = max(held, key=sum)
    scoring = {"scoring (memory_limit bounds it)": score}
    if reference:
        scoring["scoring under the reference"] = reference
    parameters = lora_parameters(model, config)
    memory = {
        "weights": model.weight_bytes,
        **lora_bytes(parameters, trained),
        **scoring,
        **process_bytes(parameters),
    }
    total, there = sum(memory.values()), available_bytes()
    return {
        "models": {"trained": model.summary()},
        "pairs": len(pairs),
        "longest_tokens": max(len(example.tokens) for pair in pairs for example in pair),
        "micro_batches": micro_batches,
        "lora_parameters": parameters,
        "memory": memory,
        "memory_bytes": total,
        "available_bytes": there,
    }


def _pairs(
    config: SftConfig | PreferConfig, trained: ModelConfig, model: PricedModel
) -> list[tuple[Example, ...]]:
    """What is scored of each pair that the context holds, as tokens."""
    tokenizer = model.tokenizer(trained)
    if tokenizer is None:
        raise ValueError(f"--dry-run: {model.name} is not on this machine; fetch it first")
    limit = trained.context_length or int(model.facts.config["context_length"])
    reads = _Reads(model.name, tokenizer, limit)
    if isinstance(config, PreferConfig):
        rows, end = (
            fit_preferences(reads, load_preferences(config.data), config),
            end_of_turn(tokenizer),
        )
        return [encode_preference(reads, row, config, end).policy for row in rows]
    if config.schema is None:
        pairs = load_pairs(config.data)
    else:
        pairs, config = record_pairs(config)
    examples = encode_pairs(tokenizer, fit_pairs(reads, pairs, config), config.prompting, limit)
    return [(example,) for example in examples]
