"""How far a command is, alike in every one: bars on a terminal, plain lines where there is none."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from alignpro.report.words import printable
from alignpro.train.callbacks import TrainCallback

# Where there is no terminal: a line for what is done, and one when nothing was said for so long.
QUIET_SECONDS = 5.0
_TICK_SECONDS = 0.2


@dataclass
class _Stage:
    total: int
    begun: float
    done: int  # what was done when it was first shown is above 0 in a run that goes on
    seen: float = 0.0  # when ``done`` was told
    note: str = ""
    first: tuple[int, float] | None = None  # what was done by the first advance, and when

    def advance(self, done: int, now: float) -> None:
        if self.first is None and done > self.done:
            self.first = (done, now)
        self.done, self.seen = done, now

    def left(self, now: float) -> float | None:
        """Seconds, at the pace from the first advance to the last: the first one waits for what is
        done once (rich's bars count alike). None before a second one."""
        if self.first is None or self.done <= self.first[0]:
            return None
        done, since = self.first
        pace = (self.seen - since) / (self.done - done)
        return max(0.0, pace * (self.total - self.done) - (now - self.seen))


class Bars:
    """One bar per name, made when its name first appears. Use as a context manager.

    While no bar is under way it says what is being done: ``doing``, and "working" later. What
    alignpro logs meanwhile, such as a download, is said as well.

    console: None is stderr, so that results alone are on stdout.
    """

    def __init__(self, doing: str = "working", *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._doing = doing
        self._stages: dict[str, _Stage] = {}
        self._log = _Said(self)
        self._level = logging.NOTSET
        self._bars = _TerminalBars(self._console, doing) if self._console.is_terminal else None
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._said = self._since = time.monotonic()

    def __enter__(self) -> Bars:
        logger = logging.getLogger("alignpro")
        self._level = logger.level
        logger.addHandler(self._log)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        if self._bars is not None:
            self._bars.progress.start()
        else:
            self._said = self._since = time.monotonic()
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("alignpro")
        logger.removeHandler(self._log)
        logger.setLevel(self._level)
        if self._bars is not None:
            self._bars.stop()
        else:
            self._stopped.set()
            self._ticker.join()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        with self._lock:
            now = time.monotonic()
            stage = self._stages.setdefault(name, _Stage(total, now, done))
            was_done = stage.done >= stage.total and stage.total == total
            stage.advance(done, now)
            stage.total, stage.note = total, note
            if self._bars is not None:
                self._bars.show(name, done, total, note)
            elif (done >= total and not was_done) or now - self._said >= QUIET_SECONDS:
                self._write(self._line(name, stage, now))
            if done >= total:
                self.doing("working")

    def doing(self, what: str) -> None:
        """Say what takes its time without a count."""
        with self._lock:
            self._doing, self._since = what, time.monotonic()
            if self._bars is not None:
                self._bars.doing(what)

    def say(self, text: str) -> None:
        """A line that stays, above the bars."""
        self._write(printable(text), style="yellow")

    def quiet(self) -> None:
        """A line, where none was written for `QUIET_SECONDS`."""
        with self._lock:
            now = time.monotonic()
            if now - self._said < QUIET_SECONDS:
                return
            open_stages = [s for s in self._stages.items() if s[1].done < s[1].total]
            if open_stages:
                self._write(self._line(*open_stages[-1], now))
            else:
                self._write(f"{self._doing}, {_clock(now - self._since)}")

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_SECONDS):
            self.quiet()

    def _line(self, name: str, stage: _Stage, now: float) -> str:
        left = stage.left(now)
        parts = [f"{name} {stage.done}/{stage.total}", _clock(now - stage.begun)]
        if left is not None and stage.done < stage.total:
            parts.append(f"{_clock(left)} left")
        return ", ".join([*parts, stage.note] if stage.note else parts)

    def _write(self, line: str, style: str = "") -> None:
        self._said = time.monotonic()
        self._console.print(Text(line, style=style), soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class _Said(logging.Handler):
    """What alignpro logs, as lines above the bars."""

    def __init__(self, bars: Bars) -> None:
        super().__init__(logging.INFO)
        self._bars = bars

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self._bars.say(f"warning: {said}" if record.levelno >= logging.WARNING else said)


class _Count(ProgressColumn):
    """3/20; nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{int(task.completed)}/{int(task.total)}")


class _Left(TimeRemainingColumn):
    """0:00:12 left, as the plain lines have it."""

    def render(self, task: Task) -> Text:
        left = super().render(task)
        return left.append(" left") if left and not task.finished else Text("")


class _TerminalBars:
    def __init__(self, console: Console, doing: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=3600.0,  # a step may take minutes
        )
        self._tasks: dict[str, TaskID] = {}
        self._without_count = self.progress.add_task(doing, total=None, note="")

    def stop(self) -> None:
        self.progress.remove_task(self._without_count)
        self.progress.stop()

    def show(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total, note=note)
        self.progress.update(self._tasks[name], completed=done, total=total, note=note)
        self.progress.update(self._without_count, visible=False)

    def doing(self, what: str) -> None:
        under_way = any(not task.finished for task in self.progress.tasks if task.total is not None)
        self.progress.reset(
            self._without_count, description=what, total=None, visible=not under_way
        )


def show_sft_row(bars: Bars, row: Mapping[str, Any], steps: int) -> None:
    bars.show("warm start", row["step"] + 1, steps, f"loss {row['loss']:.3f}")


def show_preference_row(bars: Bars, row: Mapping[str, Any], steps: int) -> None:
    note = f"loss {row['loss']:.3f}, chosen above rejected {row['accuracy']:.0%}"
    if "heldout" in row:
        held_out = row["heldout"]
        low, high = held_out["accuracy_ci95"]
        note += f", held out {held_out['accuracy']:.0%} ({low:.0%} to {high:.0%})"
    bars.show("preferences", row["step"] + 1, steps, note)


class TrainBar(TrainCallback):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._held_out = ""
        self._said: set[str] = set()  # rules whose warning was shown

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self._steps = int(config["steps"])
        self._bars.show("training", step, self._steps)

    def on_step(self, row: Mapping[str, Any]) -> None:
        if "kl_per_rewrite" in row:
            note = f"reward {row['reward_mean']:.3f}, KL {row['kl_per_rewrite']:.2f} nats"
        else:  # a fit to answers that are all drawn: their reward stays what it is
            note = f"loss {row['loss']:.3f}"
        if "heldout" in row:
            self._held_out = f", held out {row['heldout']['reward_mean']:.3f}"
        self._bars.show("training", row["step"] + 1, self._steps, note + self._held_out)
        for rule, text in row.get("warnings", {}).items():
            if rule not in self._said:
                self._said.add(rule)
                self._bars.say(f"warning at step {row['step']}: {text}")
