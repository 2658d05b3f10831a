"""Files that are written whole or not at all, and those that grow line by line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # behind the name of a file that is still being written


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which stands at ``path`` once the block is done and never before.

    What was at ``path`` stays there until then, and stays there after an error.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON document, indented for a reader."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def recorded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that grows line by line, with their numbers from 1.

    A last line that a crash cut short is left out, and cut off the file once the others are taken:
    who stops at one of them, because the file is no such one, leaves it as it was.
    """
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    yield from enumerate(whole.splitlines(), start=1)
    if whole != text:
        write_file(path, whole)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, where the system can."""
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
