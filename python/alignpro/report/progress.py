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
from rich.text import Text

from alignpro.report.words import printable
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

    def say(self, text: str) -> None:
        """A line that stays, above the bars."""
        self._progress.console.print(Text(printable(text), style="yellow"))


def show_sft_row(bars: Bars, row: Mapping[str, Any], steps: int) -> None:
    bars.show("warm start", row["step"] + 1, steps, f"loss {row['loss']:.3f}")


class TrainBar(TrainCallback):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._held_out = ""
        self._said: set[str] = set()  # rules whose warning was shown

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self._steps = int(config["steps"])
        self._bars.show("training", step, self._steps)

    def on_step(self, row: Mapping[str, Any]) -> None:
        note = f"reward {row['reward_mean']:.3f}"
        if "kl_per_rewrite" in row:
            note += f", KL {row['kl_per_rewrite']:.2f} nats"
        if "heldout" in row:
            self._held_out = f", held out {row['heldout']['reward_mean']:.3f}"
        self._bars.show("training", row["step"] + 1, self._steps, note + self._held_out)
        for rule, text in row.get("warnings", {}).items():
            if rule not in self._said:
                self._said.add(rule)
                self._bars.say(f"warning at step {row['step']}: {text}")
