"""The memory of a fit, for `--dry-run` of `sft`, `prefer`, `self-improve`, `mix --distill` and of
`train` with algorithm closed_form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from alignpro.bench.machine import available_bytes
from alignpro.config import (
    ModelConfig,
    PreferConfig,
    SelfImproveConfig,
    SftConfig,
    TrainConfig,
    target_of,
)
from alignpro.data.load import is_local, load_prompts
from alignpro.data.preferences import load_preferences
from alignpro.models.reading import prompter_tokens, target_tokens
from alignpro.models.tokenizer import Tokenizer
from alignpro.price.estimate import asked_of, is_shared, lora_bytes, process_bytes
from alignpro.price.lengths import find_lengths, local_prompts
from alignpro.price.models import PricedModel, find_priced
from alignpro.price.work import lora_parameters, score_bytes
from alignpro.train.micro_batches import Activations, fit_micro_batches
from alignpro.train.preference import encode_preference, fit_preferences
from alignpro.train.schedule import batch_indices, count_prompts
from alignpro.train.sft import Example, encode_pairs, end_of_turn, fit_pairs, read_pairs


@dataclass(frozen=True)
class _Reads:
    """See `language_model.Reads`."""

    name: str
    tokenizer: Tokenizer
    context_length: int


# What is fitted to texts that are drawn in the run itself, of which the most is known.
DrawnConfig = SelfImproveConfig | TrainConfig  # the latter with algorithm closed_form


def price_fit(config: SftConfig | PreferConfig | DrawnConfig) -> dict[str, Any]:
    """What the fit holds in memory at most, as plain values; no weights are loaded and nothing is
    fetched. Of pairs that are there by those of every step, of what a run draws for itself by texts
    of its greatest length. Of a target behind an endpoint: what it is asked, and the price of that.

    Raises ValueError: data or a model that is not on this machine, a device or tuner that is not
    priced, and what the fit itself refuses of its pairs.
    """
    trained = config.prompter if isinstance(config, SftConfig) else config.trained
    if trained.device != "cpu" or config.tuner != "lora":
        raise ValueError(
            f"--dry-run: expected device cpu and tuner lora, got {trained.device} and "
            f"{config.tuner}, which are not priced"
        )
    if not is_local(config.data):
        raise ValueError(f"--dry-run: {config.data.path} is not on this machine; fetch it first")
    model = find_priced(trained.name).held("cpu", trained.resolved_compute)
    texts = _texts(config, trained, model)
    together = 2 if isinstance(config, PreferConfig | SelfImproveConfig) else 1

    def bytes_of(some: Sequence[Sequence[int]], begins: Sequence[int], mode: Activations) -> int:
        options = {"sequences": some, "starts": begins, "activations": mode}
        return score_bytes(model, config, config.threads, **options)

    held: list[tuple[int, int]] = [(0, 0)]  # by the policy, and under the reference meanwhile
    micro_batches = 0
    for examples in _batches(config, texts):
        sequences, starts = [e.tokens for e in examples], [e.start for e in examples]
        plan = fit_micro_batches(sequences, starts, config, bytes_of, together=together)
        micro_batches = max(micro_batches, len(plan))
        for micro in plan:
            part, begins = micro.of(sequences), micro.of(starts)
            other = bytes_of(part, begins, "recompute") if _reads_reference(config) else 0
            held.append((bytes_of(part, begins, micro.activations), other))
    score, reference = max(held, key=sum)
    scoring = {"scoring (memory_limit bounds it)": score}
    if reference:
        scoring["scoring under the reference"] = reference
    parameters = lora_parameters(model, config)
    models, memory, asked = {"trained": model}, {"weights": model.weight_bytes}, None
    if isinstance(config, DrawnConfig):
        answers = target_of(config.prompter, config.target)
        target = _target(config, answers, model)
        if target is not None:
            models["target"] = target
            memory["target weights"] = target.weight_bytes
        positions = _positions(config, texts)
        if isinstance(config, TrainConfig) and config.closed_form.mixture is None:
            of_target, asked = _answering(config, answers, len(texts), model, target or model)
            if target is None:  # one engine
                positions += of_target
            else:
                kv = _kv_bytes(answers, target, of_target)
                memory["keys and values of the target"] = kv
        memory["keys and values"] = _kv_bytes(trained, model, positions)
    memory |= {**lora_bytes(parameters, trained), **scoring, **process_bytes(parameters)}
    total, there = sum(memory.values()), available_bytes()
    return {
        "models": {role: one.summary() for role, one in models.items()},
        "endpoint": asked,
        "rows": len(texts),
        "rows_are": "prompts" if isinstance(config, TrainConfig) else "pairs",
        "longest_tokens": max(len(example.tokens) for group in texts for example in group),
        "micro_batches": micro_batches,
        "lora_parameters": parameters,
        "memory": memory,
        "memory_bytes": total,
        "available_bytes": there,
    }


def _batches(
    config: SftConfig | PreferConfig | DrawnConfig, texts: list[tuple[Example, ...]]
) -> Iterator[list[Example]]:
    """What is scored at once: in every step, or, where that is drawn yet, in the longest."""
    if _is_pooled(config):
        size = config.closed_form.batch_size
    else:
        size = config.prompts_per_step if isinstance(config, TrainConfig) else config.batch_size
    if isinstance(config, DrawnConfig):
        longest = sorted(texts, key=lambda group: -len(group[0].tokens))
        yield [example for group in longest[:size] for example in group]
        return
    for step in range(config.steps):
        cursor = step * size
        chosen = batch_indices(seed=config.seed, cursor=cursor, count=size, rows=len(texts))
        yield [example for index in chosen for example in texts[index]]


def _is_pooled(config: Any) -> TypeGuard[TrainConfig]:
    """One text of a prompt is fitted at a time, without a look at the reference."""
    return isinstance(config, TrainConfig) and config.closed_form.loss == "pooled"


def _reads_reference(config: SftConfig | PreferConfig | DrawnConfig) -> bool:
    return not isinstance(config, SftConfig) and not _is_pooled(config)


def _target(config: DrawnConfig, answers: ModelConfig, trained: PricedModel) -> PricedModel | None:
    """The target, where it takes memory of its own here."""
    if config.policy == "target" or answers.endpoint is not None:
        return None
    target = find_priced(answers.name)
    if is_shared(config, trained, target):
        return None
    return target.held("cpu", answers.resolved_compute)


def _positions(config: DrawnConfig, texts: list[tuple[Example, ...]]) -> int:
    """Of all texts that are drawn."""
    if isinstance(config, TrainConfig):
        drawn = config.num_rewrites
    else:
        drawn = config.candidates * (sum(config.keep) if config.policy == "target" else 1)
    return sum(e.start + drawn * (len(e.tokens) - e.start) for e, *_ in texts)


def _kv_bytes(config: ModelConfig, model: PricedModel, positions: int) -> int:
    """Keys and values of so many positions, as far as the engine keeps them: in a quarter of the
    free memory, where nothing is said."""
    limit = config.kv_cache_bytes or (available_bytes() or 0) // 4
    return min(limit, 4 * int(model.facts.kv_elements) * positions)


def _answering(
    config: TrainConfig,
    answers: ModelConfig,
    prompts: int,
    prompter: PricedModel,
    target: PricedModel,
) -> tuple[int, dict[str, Any] | None]:
    """Positions of the target for its answers to so many prompts, or what an endpoint is asked."""
    here = answers.endpoint is None
    lengths = find_lengths(
        local_prompts(config.data),
        config.prompting,
        config.rewrite.max_new_tokens,
        prompter.tokenizer(config.prompter),
        target.tokenizer(answers) if here else None,
    )
    assert config.num_responses != "auto"  # the configuration's rule
    contexts = prompts * (config.closed_form.answers or config.num_rewrites)
    calls = contexts * config.num_responses
    if not here:
        return 0, asked_of(config, lengths, calls)
    read = prompts * lengths.target_head + contexts * (lengths.target - lengths.target_head)
    return read + calls * config.response.max_new_tokens, None


def _texts(
    config: SftConfig | PreferConfig | DrawnConfig, trained: ModelConfig, model: PricedModel
) -> list[tuple[Example, ...]]:
    """What is scored of each pair, or prompt, that the context holds, as tokens."""
    tokenizer = model.tokenizer(trained)
    if tokenizer is None:
        raise ValueError(f"--dry-run: {model.name} is not on this machine; fetch it first")
    limit = trained.context_length or int(model.facts.config["context_length"])
    reads = _Reads(model.name, tokenizer, limit)
    if isinstance(config, DrawnConfig):
        return _longest_texts(config, tokenizer, limit)
    if isinstance(config, PreferConfig):
        rows, end = (
            fit_preferences(reads, load_preferences(config.data), config),
            end_of_turn(tokenizer),
        )
        return [encode_preference(reads, row, config, end).policy for row in rows]
    pairs, config = read_pairs(config)
    examples = encode_pairs(tokenizer, fit_pairs(reads, pairs, config), config.prompting, limit)
    return [(example,) for example in examples]


def _longest_texts(
    config: DrawnConfig, tokenizer: Tokenizer, limit: int
) -> list[tuple[Example, ...]]:
    """Of each prompt the pair, or the rewrites, as long as they may become."""
    rows = load_prompts(config.data)
    if isinstance(config, TrainConfig):
        rows = rows[: count_prompts(config, len(rows))]
        count = 1 if _is_pooled(config) else config.num_rewrites
    else:
        rows, count = rows[: config.num_prompts], 2
    of_target = config.policy == "target"
    written = (config.response if of_target else config.rewrite).max_new_tokens
    written += not isinstance(config, TrainConfig)  # the end, taught behind a text that was cut
    texts = []
    for row in rows:
        if of_target:
            read = target_tokens(tokenizer, row.prompt, most=limit)
        else:
            read = prompter_tokens(tokenizer, config.prompting, row.prompt, limit, written)
        read = read[: max(1, limit - written)]  # a longer one is refused, left out or cut
        # Texts that share no beginning of their own.
        texts.append(
            tuple(Example([*read, *[number] * written], len(read)) for number in range(count))
        )
    return texts
