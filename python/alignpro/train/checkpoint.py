"""Checkpoints: written whole or not at all, read without running code.

A run directory holds config.json, reference/ (the frozen adapter training started from, if any),
metrics.jsonl, checkpoints/step-NNNNNN/ and, at the end, adapter/. A checkpoint holds the adapter
(PEFT), the state of the optimizer and of a value head, and state.json, with their digests.
Randomness is keyed by (seed, step, ...), so no generator's state needs keeping.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignpro.config import HOW_IT_RUNS, differing
from alignpro.files import PARTIAL, sync_folder, whole_file, write_json
from alignpro.fingerprints import Fingerprints, check_same_inputs, write_fingerprints
from alignpro.models.adapter import AdapterWeights, load_peft, save_peft
from alignpro.run_directory import CONFIG, one_line, remove_run_files

KEPT = 2  # checkpoints kept: the newest, and one in case it is spoiled
_STATE = "state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped."""

    step: int  # steps done
    cursor: int  # prompts drawn
    config: dict[str, Any]  # of the run
    weights: AdapterWeights
    optimizer: dict[str, Any]  # torch's state_dict
    adaptive: dict[str, Any]  # what a run learns beside its weights: `Adaptive`
    critic: dict[str, Any] | None = None  # the value head and its optimizer: `Critic.state_dict`


def begin_run(
    run_dir: Path,
    config: Mapping[str, Any],
    made_from: Fingerprints,
    start: AdapterWeights | None,
    restore: Callable[[Mapping[str, str]], int] | None,
    *,
    allow_changes: bool,
) -> None:
    """Write down what a resume needs, of a new run or of one that goes on.

    start: the adapter that training begins with. restore: takes up what the directory holds, and
    returns the steps that are done; it is told `fingerprints.same_elsewhere`. None: a new run.

    Raises ValueError as `fingerprints.check_same_inputs` and ``restore``.
    """
    changed, step = list[str](), 0
    if restore is not None:
        changed, same = check_same_inputs(run_dir, made_from, allow_changes=allow_changes)
        step = restore(same)
    write_fingerprints(run_dir, made_from, changed=changed, step=step)
    if start is not None:
        save_peft(run_dir / "reference", start)
    # Last: where it is, everything that a resume needs is there as well.
    write_json(run_dir / CONFIG, config)


def save_checkpoint(run_dir: str | Path, checkpoint: Checkpoint) -> Path:
    """Write run_dir/checkpoints/step-NNNNNN: on disk as a whole, or not there.

    Those of later steps are of a run that went back to an earlier one, and go.
    """
    run_dir = Path(run_dir)
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    sync_folder(run_dir)
    final = root / f"step-{checkpoint.step:06d}"
    partial = final.with_name(final.name + PARTIAL)
    remove_run_files(run_dir, partial)
    try:
        _write(partial, checkpoint)
    except BaseException:
        remove_run_files(run_dir, partial)  # on a full disk, its place is needed
        raise
    remove_run_files(run_dir, final)  # the same step of the same run: the same content
    os.replace(partial, final)
    sync_folder(root)
    folders = _folders(root)
    newest = [folder for folder in folders if _step_of(folder) <= checkpoint.step][-KEPT:]
    for folder in folders:
        if folder not in newest:
            remove_run_files(run_dir, folder)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    save_peft(folder / "adapter", checkpoint.weights)
    _save(folder / "optimizer.pt", checkpoint.optimizer)
    if checkpoint.critic is not None:
        _save(folder / "critic.pt", checkpoint.critic)
    names = ("step", "cursor", "config", "adaptive")
    state: dict[str, Any] = {name: getattr(checkpoint, name) for name in names}
    write_json(folder / _STATE, {**state, "sha256": _digests(folder)})


def _save(path: Path, state: Any) -> None:
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, of which torch tells positions
            raise error.__context__ from None
        raise


def load_checkpoint(
    run_dir: str | Path, lora_modules: Mapping[str, tuple[int, int]]
) -> Checkpoint | None:
    """The last whole checkpoint; None where the run has none. One that is damaged (a copy cut
    short, a disk that lost what it had) is passed over, and a warning says so.

    Raises:
        OSError: the system does not let it be read, which says nothing about what is in it.
    """
    for folder in reversed(_folders(Path(run_dir) / "checkpoints")):
        try:
            return _read(folder, lora_modules)
        except (
            Exception
        ) as error:  # torch.load has no common base class for what a torn file raises
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            reason = one_line(error)[:200]
            _log.warning("%s: damaged (%s); it is passed over", folder, reason)
    _log.warning("%s: no whole checkpoint; beginning with the first step", run_dir)
    return None


def _read(folder: Path, lora_modules: Mapping[str, tuple[int, int]]) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    digests = _digests(folder)
    for name, digest in state["sha256"].items():
        if digests.get(name) != digest:
            raise ValueError(f"{name} is not what was written")
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    critic = None
    if (folder / "critic.pt").exists():
        critic = torch.load(folder / "critic.pt", weights_only=True)
    return Checkpoint(
        int(state["step"]),
        int(state["cursor"]),
        dict(state["config"]),
        load_peft(folder / "adapter", dict(lora_modules)),
        optimizer,
        dict(state["adaptive"]),
        critic,
    )


def _folders(root: Path) -> list[Path]:
    """By step."""
    found = [f for f in root.glob("step-[0-9]*[0-9]") if f.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the state."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != _STATE)
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def check_same_run(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    same: Mapping[str, str] | None = None,
    *,
    free: frozenset[str] | None = None,
    done: int = 0,
) -> None:
    """Refuse to resume under another configuration, or to fewer steps than are done.

    same: `fingerprints.same_elsewhere`; that something lies elsewhere now is said. free: the fields
    that may differ; None is `MAY_CHANGE`.

    Raises:
        ValueError: names the fields that differ. A linear schedule is laid out over ``steps``, so
            then that may not.
    """
    if done > now.get("steps", done):
        raise ValueError(
            f"steps: the run has done {done}, more than the {now['steps']} that are asked for; "
            "another run_dir begins anew"
        )
    free = MAY_CHANGE if free is None else free
    if now.get("lr_schedule") == "linear":
        free = free - {"steps"}
    different = {k: v for k, v in differing(saved, now).items() if k not in free}
    for key in [key for key in different if key in (same or {})]:
        was, value = different.pop(key)
        _log.warning("%s was %r, is %r: the same %s", key, was, value, (same or {})[key])
    if different:
        raise ValueError(
            "cannot resume under another configuration: "
            + "; ".join(f"{k} was {was!r}, is {value!r}" for k, (was, value) in different.items())
        )


# They decide how far, how fast and in how much memory a run goes, not what a step computes (micro-
# batches: up to the rounding of a sum).
MAY_CHANGE = frozenset(
    {
        *("steps", "run_dir", "threads", "checkpoint_every", "track"),
        *("micro_batch_size", "memory_limit", "activations"),
        *(f"{role}.{path}" for role in ("prompter", "target") for path in HOW_IT_RUNS),
    }
)
