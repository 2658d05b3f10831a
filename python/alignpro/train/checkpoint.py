"""Checkpoints: written whole or not at all, read without running code.

A run directory holds config.json, reference/ (the frozen adapter training started from, if any),
metrics.jsonl, checkpoints/step-NNNNNN/ and, at the end, adapter/. A checkpoint holds the adapter
(PEFT), the state of the optimizer and of a value head, and state.json. Randomness is keyed by
(seed, step, ...), so no generator's state needs keeping.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from alignpro.config import Budget, ClientConfig
from alignpro.files import PARTIAL, whole_file, write_file, write_json
from alignpro.models.adapter import LoraWeights, load_peft, save_peft
from alignpro.run_directory import one_line, remove_run_files

KEPT = 2  # checkpoints kept: the newest, and one in case a person finds it spoiled


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped."""

    step: int  # steps done
    cursor: int  # prompts drawn
    config: dict[str, Any]  # of the run
    weights: LoraWeights
    optimizer: dict[str, Any]  # torch's state_dict
    adaptive: dict[str, Any]  # what a run learns beside its weights: `Adaptive`
    critic: dict[str, Any] | None = None  # the value head and its optimizer: `Critic.state_dict`


def save_checkpoint(run_dir: str | Path, checkpoint: Checkpoint) -> Path:
    """Write run_dir/checkpoints/step-NNNNNN and point ``latest`` at it."""
    run_dir = Path(run_dir)
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:06d}"
    partial, final = root / f"{name}{PARTIAL}", root / name
    remove_run_files(run_dir, partial)
    partial.mkdir()
    save_peft(partial / "adapter", checkpoint.weights)
    with whole_file(partial / "optimizer.pt") as file:
        torch.save(checkpoint.optimizer, file)
    if checkpoint.critic is not None:
        with whole_file(partial / "critic.pt") as file:
            torch.save(checkpoint.critic, file)
    names = ("step", "cursor", "config", "adaptive")
    state = {name: getattr(checkpoint, name) for name in names}
    write_json(partial / "state.json", state)
    remove_run_files(run_dir, final)  # the same step of the same run: the same content
    os.replace(partial, final)
    write_file(root / "latest", name + "\n")
    for old in sorted(root.glob("step-[0-9]*[0-9]"))[:-KEPT]:
        remove_run_files(run_dir, old)
    return final


def load_checkpoint(
    run_dir: str | Path, lora_modules: Mapping[str, tuple[int, int]]
) -> Checkpoint | None:
    """The checkpoint that ``latest`` names; None where the run has not written one."""
    root = Path(run_dir) / "checkpoints"
    if not (root / "latest").exists():
        return None
    folder = root / (root / "latest").read_text(encoding="utf-8").strip()
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
        critic = None
        if (folder / "critic.pt").exists():
            critic = torch.load(folder / "critic.pt", weights_only=True)
        step, cursor, config = int(state["step"]), int(state["cursor"]), dict(state["config"])
        adaptive = dict(state["adaptive"])
    except Exception as error:  # torch.load has no common base class for what a torn file raises
        raise ValueError(
            f"{folder}: unreadable checkpoint ({one_line(error)[:200]}); "
            f"name another in {root / 'latest'}"
        ) from error
    weights = load_peft(folder / "adapter", dict(lora_modules))
    return Checkpoint(step, cursor, config, weights, optimizer, adaptive, critic)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume under another configuration.

    Raises:
        ValueError: names the fields that differ. Those in `MAY_CHANGE` may; a linear schedule is
            laid out over ``steps``, so then that may not.
    """
    free = MAY_CHANGE - {"steps"} if now.get("lr_schedule") == "linear" else MAY_CHANGE
    before, after = _flat(saved), _flat(now)
    different = [k for k in sorted({*before, *after} - free) if before.get(k) != after.get(k)]
    if different:
        raise ValueError(
            "cannot resume under another configuration: "
            + "; ".join(f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in different)
        )


def _flat(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        group = isinstance(value, Mapping)
        flat |= _flat(value, f"{path}{key}.") if group else {path + key: value}
    return flat


# They decide how far, how fast and in how much memory a run goes, not what a step computes (micro-
# batches: up to the rounding of a sum).
MAY_CHANGE = frozenset(
    {
        *("steps", "run_dir", "threads", "checkpoint_every", "track"),
        *("micro_batch_size", "memory_limit", "activations"),
        *("prompter.kv_cache_bytes", "prompter.prefix_cache", "prompter.max_batch_rows"),
        *("target.kv_cache_bytes", "target.prefix_cache", "target.max_batch_rows"),
        *("target.endpoint", "target.api_key_env", "target.max_failed"),
        *(f"target.client.{f.name}" for f in fields(ClientConfig) if f.name != "body"),
        *(f"target.client.budget.{f.name}" for f in fields(Budget)),
    }
)
