"""What a run tells those who watch it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class TrainCallback:
    """Watches a training run. Derive from it and write the methods you need; these do nothing.

    They are called on the thread that trains, between steps: what they take, the run waits for. An
    exception stops the run as any other error does, after its checkpoint is written.
    """

    def on_start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Before the first step. step: steps done before, above 0 in a run that is resumed."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """After every step, with its row of metrics.jsonl, which is on disk by then."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """After a checkpoint of so many steps is on disk as ``path``."""

    def on_end(self, run_dir: Path) -> None:
        """Last, and also after an error or Ctrl-C; only where ``on_start`` had returned."""


@contextlib.contextmanager
def watching(
    callbacks: Sequence[TrainCallback], run_dir: Path, config: Mapping[str, Any], step: int
) -> Iterator[None]:
    """``on_start`` of all, the block, then ``on_end`` of those that started, in reverse order."""
    with contextlib.ExitStack() as started:
        for callback in callbacks:
            callback.on_start(run_dir, config, step)
            started.callback(callback.on_end, run_dir)
        yield
