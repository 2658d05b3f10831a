"""Files that are written whole or not at all, those that grow line by line, and locks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

PARTIAL = ".partial"  # behind the name of a file that is still being written
LOCKED = ".lock"  # of the lock that is beside a file meanwhile


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which stands at ``path`` once the block is done and never before.

    What was at ``path`` stays there until then, and stays there after an error.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with _named(path):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """A full disk fails in a write, whose error does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which stands at ``path`` once the block is done and never before; what
    a killed process left of it is written over. Nothing may be at ``path`` but an empty folder."""
    path = path.absolute()
    partial = path.with_name(path.name + PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)
    sync_folder(path.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON document, indented for a reader."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Write a line of JSON for each row."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024  # by that specification a pointer is shorter


def check_fetched(path: str | Path) -> None:
    """Refuse what Git LFS left in the place of a file that was not fetched. Raises ValueError."""
    if os.path.getsize(path) >= _LONGEST_POINTER:
        return
    with open(path, "rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise ValueError(
                f"{path}: not the file itself but a Git LFS pointer to it; `git lfs pull` fetches "
                "it"
            )


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file that grows line by line, and put it on disk.

    Where the disk is full nothing is added: half a line would spoil the next one.
    """
    with _named(path), Path(path).open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        rest = memoryview((line + "\n").encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def read_kept(
    path: Path, take: Callable[[int, Any], None], expected: str, *, repair: bool = True
) -> bool:
    """Give the rows of a file that grows line by line to ``take``, with their numbers from 1, and
    return whether it can grow as it is.

    A last line that a crash cut short is left out, and cut off the file once the others are taken;
    one of which the line feed alone is missing, as editors leave it, is a line. repair: whether the
    file may be written to, which it may not while another process adds to it.

    Raises:
        ValueError: no UTF-8 text, or a line that is no JSON, or that ``take`` refuses by
            ValueError, KeyError or TypeError; the file stays as it was.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected lines of JSON in UTF-8: {error}") from None
    # Not `splitlines`, which parts lines at characters that JSON may hold as they are.
    *lines, last = text.split("\n")
    if last and _is_json(last):
        lines.append(last)
    for number, line in enumerate(lines, start=1):
        try:
            take(number, json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: expected {expected}; move the file away"
            ) from None
    whole = "".join(f"{line}\n" for line in lines)
    if whole != text and repair:
        write_file(path, whole)
    return repair or whole == text


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(text)
        return True
    return False


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made, or written to, before there is anything to write; makes
    nothing. Raises FileExistsError or PermissionError."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileExistsError(f"{path}: expected a folder, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{path}: cannot be written: no permission to write in {there}, or a read-only disk"
        )


def check_new_folder(path: Path) -> None:
    """As `check_folder`, of one that `whole_folder` is to put there: refuses one with something in
    it, and a mount, which nothing can take the place of."""
    for folder in (path, path.absolute().parent):
        check_folder(folder)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path}: is not empty; name another folder")
    if os.path.ismount(path):
        raise FileExistsError(f"{path}: is a mount; name a folder in it")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, where the system can."""
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_file(path: Path) -> TextIO | None:
    """The open file that holds the lock called ``path``, or None where another process has it,
    which `lock_holder` names. The system drops it with the process, however that ends."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if _is_at(file, path):
            break
        file.close()  # its holder took it away before it let go
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def lock_holder(path: Path) -> str:
    """Who has the lock, as far as it says."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


@contextlib.contextmanager
def being_written(*paths: Path | None) -> Iterator[None]:
    """Hold the files that a command will write, by a lock beside each that is gone at the end.

    Raises:
        FileExistsError: another process writes one of them.
    """
    with contextlib.ExitStack() as held:
        for path in paths:
            if path is not None:
                held.callback(hold_file(path))
        yield


def hold_file(path: Path) -> Callable[[], None]:
    """Hold a file that is to be written, by a lock beside it; what is returned lets it go.

    Raises:
        FileExistsError: another process writes it.
    """
    at = path.with_name(path.name + LOCKED)
    file = lock_file(at)
    if file is None:
        raise FileExistsError(
            f"{path}: {lock_holder(at)} is writing it; wait for it to end, or name another"
        )

    def let_go() -> None:
        at.unlink(missing_ok=True)  # before another can take it
        file.close()

    return let_go


def _is_at(file: TextIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
