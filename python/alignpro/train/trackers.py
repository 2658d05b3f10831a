"""Other people's trackers as callbacks: TensorBoard where it is installed, W&B and trackio by name.

metrics.jsonl holds everything they show, and is what the report is made from.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignpro.files import write_json
from alignpro.optional import is_installed
from alignpro.run_directory import find_record
from alignpro.train.callbacks import TrainCallback
from alignpro.train.metrics import tag_of

_log = logging.getLogger(__name__)
PROJECT = "alignpro"  # of the runs that W&B and trackio keep


def make_trackers(names: Sequence[str]) -> list[TrainCallback]:
    """TensorBoard if its package is there, and the named ones ("wandb", "trackio")."""
    check_trackers(names)
    trackers: list[TrainCallback] = [TensorBoard()] if is_installed("tensorboard") else []
    return trackers + [Service(name, _STARTS[name]) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """ImportError for the first that is not installed."""
    for name in names:
        if not is_installed(name):
            raise ImportError(
                f"track: {name} is not installed: pip install 'alignpro[{name}]', or leave it out "
                "of track (metrics.jsonl is always written)"
            )


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """(name, number or text) of a row's values; nested ones as "seconds/generate".

    The step is left out, which is an axis, and so is what is unknown (None).
    """
    for key, value in row.items():
        name = prefix + str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, str):
            yield name, value
        elif value is not None and name != "step":
            yield name, float(value)


def tagged(row: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    """`flatten` under the names of groups: "reward/mean", "kl/per_rewrite"; texts keep theirs."""
    for name, value in flatten(row):
        yield (name if isinstance(value, str) else tag_of(name)), value


class TensorBoard(TrainCallback):
    """Event files in run_dir/tensorboard: scalars, and the sample as text.

    A resumed run purges the scalars of the steps that it does again; texts cannot be purged.
    """

    _FLUSH_SECONDS = 10  # a person who watches waits no longer for a step

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step, flush_secs=self._FLUSH_SECONDS
        )
        if step == 0:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def on_step(self, row: Mapping[str, Any]) -> None:
        for name, value in tagged(row):
            write = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            write(name, value, row["step"])

    def on_end(self, run_dir: Path) -> None:
        self._writer.close()


class Service(TrainCallback):
    """A tracker that cannot take back a step: what it has is noted in run_dir/NAME.json.

    A run that is resumed does the steps after its checkpoint again, to the same numbers; the
    tracker gets each once, under the id the run began with. A copy of a run whose original is still
    there gets an id of its own.

    start: (run directory, configuration, id) -> what has ``log(metrics, step=)`` and ``finish()``.
    """

    def __init__(self, name: str, start: Callable[[Path, dict[str, Any], str], Any]) -> None:
        self._name, self._start = name, start

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self._note, self._home = run_dir / f"{self._name}.json", str(run_dir.resolve())
        self._id, self._steps = uuid.uuid4().hex[:12], 0
        note = find_record(self._note)
        if note is not None:
            home = note.get("run_dir", self._home)
            original = None if home == self._home else find_record(Path(home) / self._note.name)
            if original is not None and original["id"] == note["id"]:
                _log.warning(
                    "%s: a copy of %s, whose run at %s is %s; this one is %s",
                    *(run_dir, home, self._name, note["id"], self._id),
                )
            else:
                self._id, self._steps = str(note["id"]), int(note["steps"])
        self._run = self._start(run_dir, dict(config), self._id)
        self._write_note()

    def on_step(self, row: Mapping[str, Any]) -> None:
        if row["step"] >= self._steps:
            self._run.log(dict(tagged(row)), step=row["step"])
            self._steps = row["step"] + 1
            self._write_note()

    def on_end(self, run_dir: Path) -> None:
        self._run.finish()

    def _write_note(self) -> None:
        write_json(self._note, {"id": self._id, "steps": self._steps, "run_dir": self._home})


def _start_wandb(run_dir: Path, config: dict[str, Any], run_id: str) -> Any:
    """Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""
    wandb: Any = importlib.import_module("wandb")
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_dir.name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        config=config,
    )


def _start_trackio(run_dir: Path, config: dict[str, Any], run_id: str) -> Any:
    """Its own variables hold: TRACKIO_DIR, TRACKIO_SPACE_ID."""
    trackio: Any = importlib.import_module("trackio")
    # A run is found again by its name, which has to be this run's alone.
    name = f"{run_dir.name}-{run_id}"
    return trackio.init(project=PROJECT, name=name, resume="allow", config=config, embed=False)


_STARTS = {"wandb": _start_wandb, "trackio": _start_trackio}
