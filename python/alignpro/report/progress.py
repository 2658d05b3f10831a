"""Progress bars, alike in every command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from alignpro.train.callbacks import TrainCallback


class Bars:
    """One bar per name, made when its name first appears. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)


def show_sft_row(bars: Bars, row: Mapping[str, Any], steps: int) -> None:
    bars.show("warm start", row["step"] + 1, steps, f"loss {row['loss']:.3f}")


class TrainBar(TrainCallback):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self._steps = int(config["steps"])
        self._bars.show("training", step, self._steps)

    def on_step(self, row: Mapping[str, Any]) -> None:
        note = f"reward {row['reward_mean']:.3f}, KL {row['kl_per_rewrite']:.2f} nats"
        self._bars.show("training", row["step"] + 1, self._steps, note)
