"""Run directories and checkpoints: written whole or not at all, read without running code.

A run directory holds config.json, reference/ (the frozen adapter training started from, if any),
metrics.jsonl, checkpoints/step-NNNNNN/ and, at the end, adapter/. A checkpoint holds the adapter
(PEFT), the state of the optimizer and of a value head, and state.json. Randomness is keyed by
(seed, step, ...), so no generator's state needs keeping.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alignpro.models.adapter import LoraWeights, load_peft, save_peft

KEPT = 2  # checkpoints kept: the newest, and one in case a person finds it spoiled


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped."""

    step: int  # steps done
    cursor: int  # prompts drawn
    config: dict[str, Any]  # of the run
    weights: LoraWeights
    optimizer: dict[str, Any]  # torch's state_dict
    adaptive: dict[str, Any]  # what a run learns beside its weights: `Adaptive.to_mapping`
    critic: dict[str, Any] | None = None  # the value head and its optimizer: `Critic.state_dict`


def save_checkpoint(run_dir: str | Path, checkpoint: Checkpoint) -> Path:
    """Write run_dir/checkpoints/step-NNNNNN and point ``latest`` at it."""
    root = Path(run_dir) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:06d}"
    partial, final = root / f"{name}.partial", root / name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_peft(partial / "adapter", checkpoint.weights)
    torch.save(checkpoint.optimizer, partial / "optimizer.pt")
    if checkpoint.critic is not None:
        torch.save(checkpoint.critic, partial / "critic.pt")
    state = {
        "step": checkpoint.step,
        "cursor": checkpoint.cursor,
        "config": checkpoint.config,
        "adaptive": checkpoint.adaptive,
    }
    (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)  # the same step of the same run: the same content
    os.replace(partial, final)
    _write_atomically(root / "latest", name + "\n")
    for old in sorted(root.glob("step-[0-9]*[0-9]"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    run_dir: str | Path, lora_modules: Mapping[str, tuple[int, int]]
) -> Checkpoint | None:
    """The checkpoint that ``latest`` names; None where the run has not written one.

    Raises:
        ValueError: a checkpoint that is there and cannot be read; the message names the file.
    """
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
            f"{folder}: unreadable checkpoint ({_one_line(error)}); "
            f"name another in {root / 'latest'}"
        ) from error
    weights = load_peft(folder / "adapter", dict(lora_modules))
    return Checkpoint(step, cursor, config, weights, optimizer, adaptive, critic)


def check_run_dir(run_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Whether a run may use the directory; changes nothing.

    Raises:
        ValueError: ``resume`` and ``overwrite`` together, or ``overwrite`` of what is no run.
        FileExistsError: something is there and neither was asked for.
        FileNotFoundError: nothing to resume.
    """
    path = Path(run_dir)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"run directory {path}: a file of that name is there")
    is_run = (path / "config.json").is_file()
    if resume and not is_run:
        raise FileNotFoundError(f"run directory {path}: no run to resume there (no config.json)")
    if not resume and path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"run directory {path} is not empty: --resume goes on with it, --overwrite deletes "
                "it, run_dir=... names another"
            )
        if not is_run:
            raise ValueError(
                f"run directory {path}: not one of alignpro's (no config.json); not overwriting it"
            )
    return path


def prepare_run_dir(run_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make the run directory, or refuse as `check_run_dir` does.

    Call it when everything else about the run is known to be good.
    """
    path = check_run_dir(run_dir, resume=resume, overwrite=overwrite)
    if overwrite and path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_config(run_dir: str | Path, config: Mapping[str, Any]) -> None:
    """Write config.json, which also marks the directory as a run."""
    _write_atomically(Path(run_dir) / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The configuration of the run there.

    Raises:
        ValueError: config.json is not a JSON object.
    """
    path = Path(run_dir) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON object: {_one_line(error)}") from error


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume under another configuration.

    Raises:
        ValueError: names the fields that differ. Those in `MAY_CHANGE` may; a linear schedule is
            laid out over ``steps``, so then that may not.
    """
    free = MAY_CHANGE - {"steps"} if now.get("lr_schedule") == "linear" else MAY_CHANGE
    different = [k for k in sorted({*saved, *now} - free) if saved.get(k) != now.get(k)]
    if different:
        raise ValueError(
            "cannot resume under another configuration: "
            + "; ".join(f"{k} was {saved.get(k)!r}, is {now.get(k)!r}" for k in different)
        )


# They decide how far, how fast and in how much memory a run goes, not what a step computes (micro-
# batches: up to the rounding of a sum).
MAY_CHANGE = frozenset(
    {
        *("steps", "run_dir", "threads", "checkpoint_every", "track"),
        *("micro_batch_size", "memory_limit", "activations"),
    }
)


def as_config(config: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back."""
    mapping: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return mapping


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
