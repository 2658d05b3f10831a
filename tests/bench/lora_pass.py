"""Forward and backward of a whole model with LoRA: ours, and transformers with peft on torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from heads import Unavailable
from torch.nn import functional

from alignpro.config import LoraConfig
from alignpro.models.adapter import LoraWeights, save_peft
from alignpro.models.native_model import NativeModel, load_model
from alignpro.train.micro_batches import Activations
from alignpro.train.policy import LoraPolicy, initial_weights, one_torch_thread

RANK, SEQUENCES, LENGTH = 16, 16, 96
# Each side as it is, and recomputing its activations in the backward to save memory.
OURS, OURS_RECOMPUTING = "alignpro", "alignpro, recomputing"
PEER, PEER_RECOMPUTING = "transformers + peft", "transformers + peft, checkpointing"
PEERS = (PEER, PEER_RECOMPUTING)

Tokens = list[list[int]]


@dataclass(frozen=True)
class LoraPass:
    """One side: ``run`` returns the summed negative log-probability and leaves gradients behind."""

    run: Callable[[Tokens], float]
    gradients: Callable[[], dict[str, torch.Tensor]]  # module -> derivative by its B


def make_tokens(vocab_size: int, context_length: int) -> Tokens:
    """Random sequences that share no beginning."""
    draw = random.Random(0)
    length = min(LENGTH, context_length)
    firsts = draw.sample(range(vocab_size), SEQUENCES)
    return [[first, *(draw.randrange(vocab_size) for _ in range(length - 1))] for first in firsts]


def make_weights(model: NativeModel) -> LoraWeights:
    """A fresh adapter, the same in every process."""
    return initial_weights(model, LoraConfig(rank=RANK), seed=0)


def ours(model: NativeModel, name: str = OURS) -> LoraPass:
    """`LoraPolicy.score` and its backward."""
    activations: Activations = "recompute" if name == OURS_RECOMPUTING else "keep"
    policy = LoraPolicy(model, make_weights(model))

    @one_torch_thread()
    def run(tokens: Tokens) -> float:
        policy.zero_grad(set_to_none=True)
        starts = [1] * len(tokens)
        loss = -policy.score(tokens, starts, activations=activations).logprob.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss)

    def gradients() -> dict[str, torch.Tensor]:
        found = zip(policy.names, policy.lora_b, strict=True)
        return {name: b.grad.detach() for name, b in found if b.grad is not None}

    return LoraPass(run, gradients)


def load_peer(path: Path, weights: LoraWeights) -> Any:
    """The same weights and the same adapter in transformers and peft, float32.

    Raises:
        Unavailable: packages that are missing, or a model they do not load.
    """
    needed = ("transformers", "peft", "gguf") if path.is_file() else ("transformers", "peft")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"package {package} is not installed")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        )
        with tempfile.TemporaryDirectory() as saved:
            save_peft(Path(saved) / "adapter", weights)
            model = peft.PeftModel.from_pretrained(
                base, str(Path(saved) / "adapter"), is_trainable=True
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise Unavailable(f"transformers + peft: {' '.join(str(error).split())[:160]}") from None
    return model.train()


def peer(model: Any, name: str = PEER) -> LoraPass:
    """What `load_peer` gave, on torch's own cross entropy."""

    def run(tokens: Tokens) -> float:
        if name == PEER_RECOMPUTING:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        ids = torch.tensor(tokens)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss)

    def gradients() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and parameter.grad is not None:
                found[name.split(".lora_B.")[0].removeprefix("base_model.model.")] = parameter.grad
        return found

    return LoraPass(run, gradients)


def gradient_difference(one: LoraPass, other: LoraPass) -> float:
    """Largest difference of the derivatives by B, relative to the largest of them."""
    mine, theirs = one.gradients(), other.gradients()
    if mine.keys() != theirs.keys():
        raise RuntimeError("lora: the two sides have gradients for different modules")
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine) / largest


def make_pass(name: str, path: Path, threads: int) -> tuple[LoraPass, Tokens, int]:
    """One side by its name, alone in its process; its tokens, and the bytes of its gradients."""
    model = load_model(path, threads=threads)
    weights = make_weights(model)
    tokens = make_tokens(int(model.config["vocab_size"]), model.context_length)
    size = sum(a.nbytes + b.nbytes for a, b in weights.matrices.values())
    if name in PEERS:
        del model
        return peer(load_peer(path, weights), name), tokens, size
    return ours(model, name), tokens, size
