"""The price of a run: `alignpro train CONFIG --dry-run`."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignpro.bench.machine import available_bytes, rss_bytes
from alignpro.config import ModelConfig, SelfImproveConfig, TrainConfig, target_of
from alignpro.models.endpoint import priced
from alignpro.price.devices import CPU_RATES, Device, Rates, gpu, read_rates, this_cpu
from alignpro.price.lengths import Lengths, find_lengths, local_prompts
from alignpro.price.models import PricedModel, find_priced
from alignpro.price.work import Phase, Work, count_step
from alignpro.train.schedule import load_optimizer

# Of a trained number: itself, its gradient and AdamW's two moments; what the engine works with,
# and the copy by which a change is seen.
_LORA_BYTES = {"weights": 4, "gradients": 4, "AdamW": 8, "engine": 8}
_FROZEN_LORA_BYTES = 4
_CHECKPOINT_BYTES = 12  # the number and its two moments
_KV = "keys and values, all at once"
_KEPT = "keys and values kept of earlier steps"


def price_train(
    config: TrainConfig,
    *,
    gpu_name: str | None = None,
    rates: Rates | Path | None = None,
    prompt_tokens: int | None = None,
) -> dict[str, Any]:
    """What the run would cost, as plain values; no weights are loaded and nothing is fetched. Of a
    target behind an endpoint: what it is asked, and the price of that.

    Args:
        gpu_name: a card of `devices.gpu`; None is this CPU, whose limits are measured.
        rates: shares reached, or a file of them (`read_rates`); None takes those of
            docs/notes/performance.md on a CPU, and on a card leaves a lower bound.
        prompt_tokens: of a prompt, where the data is not here or stands for other data.
    """
    if isinstance(rates, Path):
        rates = read_rates(rates)
    device = gpu(gpu_name) if gpu_name is not None else None
    answers = target_of(config.prompter, config.target)
    here = answers.endpoint is None
    for name, where in (("prompter", config.prompter.device), ("target", answers.device)):
        if device is None and where != "cpu":
            raise ValueError(
                f'{name}.device: expected "cpu" in a price for this CPU, got "{where}"; name a '
                "card to price it there"
            )
    prompter = find_priced(config.prompter.name)
    target = None
    if here:
        target = prompter if config.target is None else find_priced(answers.name)
        target = target.held(*_place(device, answers))
    prompter = prompter.held(*_place(device, config.prompter))
    lengths = find_lengths(
        local_prompts(config.data),
        config.prompting,
        config.rewrite.max_new_tokens,
        prompter.tokenizer(config.prompter),
        None if target is None else target.tokenizer(answers),
        prompt_tokens,
    )
    work = count_step(config, lengths, prompter, target)
    process = None
    if device is None:
        process = process_bytes(work.lora_parameters)  # before limits are measured
        rates = rates or CPU_RATES
        device = this_cpu(config.threads, rates)
    if rates is not None:
        device = replace(
            device, gflops=rates.gflops or device.gflops, gbps=rates.gbps or device.gbps
        )
    memory = _memory(config, prompter, target, work, device)
    if process is not None:
        limit = config.prompter.kv_cache_bytes or (available_bytes() or 0) // 4  # the engine's own
        kept = min(memory[_KV] * (config.steps - 1), limit - memory[_KV])
        memory |= {_KEPT: max(0, kept), **process}
    least, expected = _seconds(work, device, rates)
    total = sum(memory.values())
    kv = memory[_KV] + memory.get(_KEPT, 0)
    least_total = total - kv + device.kv_bytes * work.alone_kv_elements
    fits = None
    if device.memory_bytes is not None:
        needs = ((total, "yes"), (least_total, "with fewer sequences at once"), (0, "no"))
        fits = next(words for need, words in needs if need <= device.memory_bytes)
    models = {"prompter": prompter.summary()}
    if target is not None:
        models["target"] = target.summary() | {"shared": is_shared(config, prompter, target)}
    left_out = ["reward", "loading"] if here else ["the endpoint's time", "reward", "loading"]
    return {
        "models": models,
        "endpoint": None if here else asked_of(config, lengths, work.calls * config.steps),
        "lengths": asdict(lengths),
        "steps": config.steps,
        "tokens_per_step": work.tokens,
        "tokens": {name: count * config.steps for name, count in work.tokens.items()},
        "micro_batches": work.micro_batches,
        "lora_parameters": work.lora_parameters,
        "flops_per_step": {phase.name: phase.flops for phase in work.phases},
        "bytes_per_step": {phase.name: _bytes(phase, device) for phase in work.phases},
        "flops": work.flops * config.steps,
        "memory": memory,
        "memory_bytes": total,
        "device": asdict(device),
        "least_memory_bytes": least_total,
        "fits": fits,
        "rates": None if rates is None else asdict(rates),
        "seconds_per_step": expected,
        "hours": None if expected is None else expected * config.steps / 3600,
        "least_seconds_per_step": least,
        "least_hours": least * config.steps / 3600,
        "left_out": left_out + (["warm start"] if config.trained.adapter else []),
    }


def asked_of(config: TrainConfig, lengths: Lengths, calls: int) -> dict[str, Any]:
    """What a run asks of an endpoint, which reads every conversation as a whole and may write as
    much as it is let; its price, and which budgets end the run before."""
    target = target_of(config.prompter, config.target)
    written = calls * config.response.max_new_tokens
    usage = priced(calls * lengths.target, written, target.client)
    budget, tokens = target.client.budget, usage.input_tokens + usage.output_tokens
    needs = {"calls": calls, "tokens": tokens, "cost": usage.cost}
    short = [
        name
        for name, need in needs.items()
        if need is not None and (most := getattr(budget, name)) is not None and most < need
    ]
    return {"name": target.name, "calls": calls, **asdict(usage), "budgets_too_small": short}


def _place(card: Device | None, model: ModelConfig) -> tuple[str, str]:
    """Where a model runs in the price, and how. A card that the configuration does not ask for
    computes in bfloat16."""
    if card is None or model.device == "cuda":
        return model.device, model.resolved_compute
    return "cuda", "bfloat16"


def is_shared(
    config: TrainConfig | SelfImproveConfig, prompter: PricedModel, target: PricedModel
) -> bool:
    """Whether prompter and target are one in memory, as `load_models` has it."""
    same = target.name == prompter.name
    if not same and prompter.files is not None and target.files is not None:
        same = os.path.samefile(target.files.path, prompter.files.path)
    return same and config.prompter.runs_like(target_of(config.prompter, config.target))


def _memory(
    config: TrainConfig,
    prompter: PricedModel,
    target: PricedModel | None,
    work: Work,
    device: Device,
) -> dict[str, int]:
    """Bytes by what holds them. Of keys and values, as many as all sequences of a step need at
    once; the engine takes a quarter of the free memory at most, and lets sequences wait. Those of
    earlier steps stay while there is room, for prompts that come again."""
    shared = target is not None and is_shared(config, prompter, target)
    alone = config.policy == "target" and not shared  # no prompter is loaded
    return {
        "prompter weights": 0 if alone else prompter.weight_bytes,
        "target weights": 0 if shared or target is None else target.weight_bytes,
        **lora_bytes(work.lora_parameters, config.trained),
        _KV: device.kv_bytes * work.kv_elements,
        "scoring (memory_limit bounds it)": work.score_bytes,
    }


def lora_bytes(parameters: int, trained: ModelConfig) -> dict[str, int]:
    """Of LoRA matrices that are trained, from ``trained.adapter`` or afresh."""
    sizes = {f"LoRA {name}": size * parameters for name, size in _LORA_BYTES.items()}
    if trained.adapter is not None:
        sizes["LoRA of the reference"] = _FROZEN_LORA_BYTES * parameters
    return sizes


def process_bytes(parameters: int) -> dict[str, int]:
    """What is held beside models and tensors, so many numbers being trained."""
    load_optimizer()
    found = {"a checkpoint, as it is written": _CHECKPOINT_BYTES * parameters}
    process = rss_bytes()  # None where the kernel does not say
    return found if process is None else found | {"Python, torch and tokenizers": process}


def _bytes(phase: Phase, device: Device, *, least: bool = False) -> float:
    weights = phase.least_weight_bytes if least else phase.weight_bytes
    return weights + device.kv_bytes * phase.kv_elements


def _seconds(work: Work, device: Device, rates: Rates | None) -> tuple[float, float | None]:
    """What no step can be faster than at the device's limits; and at the shares that were measured,
    None without any. There, operations and reading are added up: a step of decoding is 5 ms and
    1.5 ms a row where its weights take 5 ms to read (docs/notes/performance.md)."""
    gflops, gbps = device.gflops * 1e9, device.gbps * 1e9
    least = sum(
        max(phase.flops / gflops, _bytes(phase, device, least=True) / gbps) for phase in work.phases
    )
    if rates is None:
        return least, None

    def seconds(phase: Phase, rates: Rates) -> float:
        share = rates.generate if phase.kind == "generate" else rates.score
        flops = gflops * share * (rates.int8 if phase.int8 else 1.0)
        return phase.flops / flops + _bytes(phase, device) / (gbps * rates.bytes)

    return least, sum(seconds(phase, rates) for phase in work.phases)
