"""How the stages of an evaluation say how far they are."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]  # what, how much of it is done, how much there is


def watch(
    on_progress: OnProgress | None, what: str, total: int, done_before: int = 0
) -> Callable[[int], None] | None:
    """A pipeline's counter as one of ``what``."""
    if on_progress is None:
        return None
    return lambda done: on_progress(what, done_before + done, total)
