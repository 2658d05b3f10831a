"""What a run tells those who watch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignpro.run_directory import RunDirectory

# What comes before the first step ("rollouts"), how much of it is done, how much there is.
OnProgress = Callable[[str, int, int], None]


class TrainCallback:
    """Watches a training run. Derive from it and write the methods you need; these do nothing.

    They are called on the thread that trains, between steps: what they take, the run waits for. An
    exception stops the run as any other error does, after its checkpoint is written.
    """

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Before the first step. step: steps done before, above 0 in a run that is resumed."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """After every step, with its row of metrics.jsonl, which is on disk by then; "warnings" are
        sentences by the name of their rule, where there are any."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """After a checkpoint of so many steps is on disk as ``path``."""

    def on_end(self, run_dir: Path) -> None:
        """Last, and also after an error or Ctrl-C; only where ``on_start`` had returned."""


class Watchers:
    """The callbacks of a run. Every one is told of everything, also when another one fails; the
    first error is the one that is raised, and what fails after it is logged and noted on it."""

    def __init__(self, directory: RunDirectory, callbacks: Sequence[TrainCallback]) -> None:
        self._directory, self._callbacks = directory, list(callbacks)
        self._started: list[TrainCallback] = []

    @contextlib.contextmanager
    def watching(self, config: Mapping[str, Any], step: int) -> Iterator[None]:
        """``on_start`` of all, the block, then ``on_end`` of those that started, in reverse."""
        try:
            for callback in self._callbacks:
                callback.on_start(self._directory.path, config, step)
                self._started.append(callback)
            yield
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._tell("on_step", row)

    def on_checkpoint(self, path: Path, step: int, after: BaseException | None) -> None:
        """after: the error that ends the run, if one does."""
        self._tell("on_checkpoint", path, step, after=after)

    def _end(self, after: BaseException | None) -> None:
        self._started.reverse()
        self._tell("on_end", self._directory.path, after=after)

    def _tell(self, event: str, *arguments: Any, after: BaseException | None = None) -> None:
        first = after
        for callback in self._started:
            try:
                getattr(callback, event)(*arguments)
            except Exception as error:
                if first is None:
                    first = error
                else:
                    doing = f"{type(callback).__name__}.{event}"
                    self._directory.note_failure(first, error, doing)
        if first is not None and first is not after:
            raise first
