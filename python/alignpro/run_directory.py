"""Run directories: marked as alignpro's, used by one process, emptied of a run's files alone.

Only a directory with the marker is ever emptied, and only if it holds nothing but what a run
writes (`RUN_FILES`). Everything else in it is somebody's work, and a reason to refuse. What a run
leaves that did not do its first step is nobody's work, and in nobody's way.
"""

from __future__ import annotations

import contextlib
import json
import re
import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from alignpro.config import (
    PreferConfig,
    SelfImproveConfig,
    SftConfig,
    TrainConfig,
    from_mapping,
)
from alignpro.files import (
    LOCKED,
    PARTIAL,
    check_folder,
    lock_file,
    lock_holder,
    sync_folder,
    write_file,
)

MARKER, LOCK, ERROR_LOG = ".alignpro-run", ".alignpro-lock", "error.log"
CONFIG, FINGERPRINTS = "config.json", "fingerprints.json"
CALLS = "calls.jsonl"  # of an endpoint
_MARK = "This directory is a run of alignpro: `--overwrite` may empty it.\n"

_PEFT = r"adapter_config\.json|adapter_model\.safetensors|base_model\.json|prompter\.json"
# Answers and verdicts that were paid for stay where they are: they serve other runs as well.
_PAID = re.compile(
    rf"(?:{re.escape(CALLS)}|(?:evaluation|safety|headroom|bound)\.json"
    rf"\.(?:calls|judge|judge\.calls)\.jsonl)(?:{re.escape(LOCKED)})?"
)
# Paths in the directory, "/" between their parts.
# Rounds of self-improvement are runs of their own in one.
_ROUND = r"round-\d{2,}"
RUN_FILES = re.compile(
    rf"""(?:{_ROUND}/)?(?:
    {re.escape(MARKER)} | {re.escape(LOCK)} | {re.escape(ERROR_LOG)}
    | {re.escape(CONFIG)} | {re.escape(FINGERPRINTS)}
    | (?:report|evaluate|evaluation|safety|headroom|bound|wandb|trackio)\.json
    | (?:evaluation|safety|headroom|bound)\.json
      (?:\.arms\.jsonl|\.unjudged\.json|{re.escape(LOCKED)})
    | (?:pairs|measured)-\d{{2,}}\.jsonl | pairs-\d{{2,}}\.json
    | (?:metrics|sft-metrics|rollouts|rounds)\.jsonl | {_PAID.pattern} | report\.html | reward\.png
    | (?:adapter|reference)/(?:{_PEFT})
    | checkpoints/step-\d{{6,}}(?:{re.escape(PARTIAL)})?/
      (?:state\.json | optimizer\.pt | critic\.pt | adapter/(?:{_PEFT}))
    | tensorboard/events\.out\.tfevents\.[^/]+
    | wandb/.+
    )(?:{re.escape(PARTIAL)})?""",
    re.VERBOSE,
)
_RUN_FOLDERS = re.compile(
    rf"{_ROUND}|(?:{_ROUND}/)?(?:adapter|reference|tensorboard|wandb(?:/.+)?"
    rf"|checkpoints(?:/step-\d{{6,}}(?:{re.escape(PARTIAL)})?(?:/adapter)?)?)"
)
# What is there before the first step is done; a log without a line is such a one, too.
_BEFORE_A_STEP = re.compile(
    rf"""(?:
    {re.escape(MARKER)} | {re.escape(LOCK)} | {re.escape(ERROR_LOG)} | {_PAID.pattern}
    | {re.escape(CONFIG)} | {re.escape(FINGERPRINTS)} | sft-metrics\.jsonl | evaluate\.json
    | reference(?:/.*)? | checkpoints | tensorboard(?:/.*)? | wandb(?:/.*)?
    | (?:wandb|trackio)\.json
    | .*{re.escape(PARTIAL)}(?:/.*)?
    )""",
    re.VERBOSE,
)


class RunDirectory:
    """A run's directory, held by this process; made by `open_run_dir`.

    As a context manager it is the run: an error that ends the block is kept with its traceback in
    error.log, and noted on the error (`error_notes`); the lock is released.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[Path] = []  # folders that were made for it, the deepest first
        self._lock: TextIO | None = None
        self._depth = 0  # of blocks that hold it
        self._runs = 0  # of them, those that are the run

    def __enter__(self) -> RunDirectory:
        self._hold()
        self._depth += 1
        self._runs += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        self._runs -= 1
        if isinstance(error, Exception) and not self._runs:
            self._log(error, "the run")
            add_note(error, f"traceback: {self.path / ERROR_LOG}")
        if not self._depth:
            self._release()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock alone, before and after the run: an error in the block is none of the run's."""
        self._hold()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._release()

    @contextlib.contextmanager
    def unless_refused(self) -> Iterator[None]:
        """An error in the block before anything is written takes the directory away again."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if {entry.name for entry in self.path.iterdir()} <= {MARKER, LOCK}:
                    for name in (MARKER, LOCK):
                        (self.path / name).unlink(missing_ok=True)
                    for folder in self.made:
                        folder.rmdir()
            raise

    @contextlib.contextmanager
    def after(self, first: BaseException, doing: str) -> Iterator[None]:
        """What is left to do after an error, which stays the one that is raised: another one is
        logged, and noted on it."""
        try:
            yield
        except Exception as second:
            self.note_failure(first, second, doing)

    def note_failure(self, first: BaseException, second: Exception, doing: str) -> None:
        """Log ``second``, and note it on the error before it."""
        self._log(second, doing)
        add_note(first, f"then {doing} failed: {one_line(second)}")

    def _log(self, error: Exception, doing: str) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            with (self.path / ERROR_LOG).open("a", encoding="utf-8") as file:
                file.write(f"{when} {doing} failed\n{text}\n")
        except OSError as failure:  # a full disk may be the very error that is to be told
            add_note(error, f"{ERROR_LOG} could not be written: {one_line(failure)}")

    def _hold(self) -> None:
        """Take the lock, unless it is held already.

        The system drops it with the process, so a run that was killed leaves none behind. Objects
        of one process that are not in a block make way for each other (a notebook's cell run
        twice).
        """
        if self._lock is not None:
            return
        path = self.path / LOCK
        key = _identity(path)
        holder = None if key is None else _held.get(key)
        if holder is not None and holder._lock is not None:
            if holder._depth:
                raise FileExistsError(f"run directory {self.path}: in use by this process")
            self._lock, holder._lock = holder._lock, None
        else:
            self._lock = lock_file(path)
            if self._lock is None:
                raise FileExistsError(
                    f"run directory {self.path}: in use by {lock_holder(path)}; wait for it to "
                    "end, or run_dir=... names another"
                )
            key = _identity(path)
        assert key is not None
        _held[key] = self

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


_held: weakref.WeakValueDictionary[tuple[int, int], RunDirectory] = weakref.WeakValueDictionary()


def check_run_dir(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Whether a run may use the directory, asked before anything expensive; changes nothing.

    Raises:
        ValueError: ``resume`` and ``overwrite`` together, or ``overwrite`` of something else than
            a run, or of a run with a file in it that is not a run's.
        FileExistsError: something is there and neither was asked for, or a process uses it.
        FileNotFoundError: nothing to resume.
    """
    path = Path(path)
    if not is_run_dir(path):
        return _check(path, resume, overwrite)
    directory = RunDirectory(path)
    directory._hold()  # while another process writes, files come and go
    try:
        return _check(path, resume, overwrite)
    finally:
        directory._release()


def _check(path: Path, resume: bool, overwrite: bool) -> Path:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    where = f"run directory {path}"
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        kind = "a link to nothing" if path.is_symlink() else "a file"
        raise FileExistsError(f"{where}: {kind} of that name is there")
    check_folder(path)
    is_run = path.is_dir() and is_run_dir(path)
    if resume:
        if not (is_run and (path / CONFIG).is_file()):
            missing = f"{CONFIG} in it"
            if not is_run:
                missing = f"whole {MARKER} in it, which marks one; copies need hidden files, too"
            raise FileNotFoundError(f"{where}: no run to resume there (no {missing})")
        return path
    if not path.is_dir() or is_free(path):
        return path
    if not overwrite:
        raise FileExistsError(
            f"{where} is not empty: --resume goes on with it, --overwrite deletes it, "
            "run_dir=... names another"
        )
    if path.is_symlink():
        raise ValueError(f"{where}: a link to {path.resolve()}; to overwrite that, name it itself")
    if not is_run:
        raise ValueError(f"{where}: not one of alignpro's (no {MARKER} in it); not overwriting it")
    for entry, known in _walk(path):
        if not known:
            raise ValueError(
                f"{where}: {entry.relative_to(path).as_posix()} is not a run's; not overwriting "
                "it: move that file away, or run_dir=... names another directory"
            )
    return path


def open_run_dir(
    path: str | Path, *, resume: bool = False, overwrite: bool = False
) -> RunDirectory:
    """Make, mark and lock the run directory, emptied for ``overwrite``.

    Call it when everything else about the run is known to be good. Raises as `check_run_dir`, and
    FileExistsError where another process uses the directory.
    """
    path, made = Path(path), list[Path]()
    if not is_run_dir(path):
        _check(path, resume, overwrite)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)
    directory = RunDirectory(path)
    directory.made = made
    directory._hold()
    try:
        _check(path, resume, overwrite)  # now that nobody else can change it
        if not is_run_dir(path):
            write_file(path / MARKER, _MARK)
    except BaseException:
        directory._release()
        raise
    if not resume:  # by now it may be emptied
        for entry in list(path.iterdir()):
            if entry.name not in (MARKER, LOCK) and not _PAID.fullmatch(entry.name):
                remove_run_files(path, entry)
    return directory


def open_free_run_dir(name: str) -> RunDirectory:
    """``name``, or ``name-2``, ``name-3``, ...: the first that no run is in and nobody uses."""
    path, number = Path(name), 1
    while True:
        if not path.exists() or (path.is_dir() and is_free(path)):
            with contextlib.suppress(FileExistsError):  # another process was faster
                return open_run_dir(path)
        number += 1
        path = Path(f"{name}-{number}")


def is_free(folder: Path) -> bool:
    """Whether a folder is empty, or of a run that did not do its first step."""
    entries = [(e, known, e.relative_to(folder).as_posix()) for e, known in _walk(folder)]
    if not is_run_dir(folder):
        return all(name in (LOCK, CALLS, CALLS + LOCKED) for _, _, name in entries)
    return all(
        known and (_BEFORE_A_STEP.fullmatch(name) or _is_log_without_a_line(entry))
        for entry, known, name in entries
    )


def _is_log_without_a_line(entry: Path) -> bool:
    return entry.suffix == ".jsonl" and entry.is_file() and b"\n" not in entry.read_bytes()


def run_of_config(path: str | Path | None) -> Path | None:
    """The run directory that a file is the config.json of; None for another file. Where the run was
    copied or moved to is where it goes on, whatever ``run_dir`` in the file says; a copy without
    its marker is none to go on with, and still no reason to go on with the original."""
    if path is None or Path(path).name != CONFIG:
        return None
    folder = Path(path).parent
    return folder if is_run_dir(folder) or (folder / FINGERPRINTS).exists() else None


def run_around(*paths: str | Path | None) -> Path | None:
    """The run directory that is, or holds, the first of ``paths`` of which one does."""
    for path in paths:
        around = [] if path is None else [Path(path), *Path(path).resolve().parents]
        run = next((p for p in around if is_run_dir(p)), None)
        if run is not None and (run / CONFIG).is_file():
            return run
    return None


def recorded_date(*paths: str | Path | None) -> str | None:
    """The date that the run around ``paths`` was told.

    Raises:
        ValueError: its config.json is damaged.
    """
    run = run_around(*paths)
    date = None if run is None else read_record(run / CONFIG).get("date")
    return date if isinstance(date, str) else None


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        ValueError: not one. FileNotFoundError: no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON: {one_line(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


RunConfig = TrainConfig | PreferConfig | SelfImproveConfig | SftConfig


def config_of_run(run: Path) -> RunConfig:
    """What a run was made with: a training, by rewards, on preferences or on its own answers, or a
    warm start.

    Raises:
        ValueError: its config.json is damaged; the message names it. FileNotFoundError: no such.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run}: expected the directory of a run, with {CONFIG}")
    record = read_record(run / CONFIG)
    try:
        return from_mapping(_kind_of(record)[1], record)
    except ValueError as error:
        raise ValueError(f"{run / CONFIG}: {error}") from None


def configs_of_runs(runs: Iterable[str]) -> dict[Path, RunConfig]:
    """By directory. Raises as `config_of_run`."""
    return {Path(run): config_of_run(Path(run)) for run in runs}


# The command that makes such runs, by a field that no one before has.
_KINDS: dict[str, tuple[str, type[RunConfig]]] = {
    "calibration": ("self-improve", SelfImproveConfig),
    "beta": ("prefer", PreferConfig),
    "policy": ("train", TrainConfig),
    "run_dir": ("sft", SftConfig),
}


def _kind_of(record: Mapping[str, Any]) -> tuple[str, type[RunConfig]]:
    return next((kind for field, kind in _KINDS.items() if field in record), _KINDS["run_dir"])


def command_of(kind: type) -> str:
    """The command whose runs have such a configuration; "" of none."""
    return next((command for command, made in _KINDS.values() if made is kind), "")


def check_kind(run: Path, cls: type) -> None:
    """Refuse the run of another command than that whose configuration ``cls`` is. Raises
    ValueError."""
    command, kind = _kind_of(read_record(run / CONFIG))
    expected = command_of(cls)
    if cls is not kind and expected:
        raise ValueError(
            f"run directory {run}: a run of `alignpro {command}`, expected one of `alignpro "
            f"{expected}`"
        )


def find_record(path: Path) -> dict[str, Any] | None:
    """As `read_record`; None where there is no file."""
    return read_record(path) if path.exists() else None


def is_run_dir(path: str | Path) -> bool:
    """Whether the directory has the marker of a run."""
    marker = Path(path) / MARKER
    return marker.is_file() and not marker.is_symlink() and marker.read_bytes() == _MARK.encode()


def remove_run_files(run_dir: Path, entry: Path) -> None:
    """Delete a file or folder of a run, but nothing below it that a run does not write."""
    if entry.is_dir() and not entry.is_symlink():
        for below, known in reversed(list(_walk(run_dir, entry))):
            if known and below.is_dir() and not below.is_symlink():
                with contextlib.suppress(OSError):  # what is not a run's is still in it
                    below.rmdir()
            elif known:
                below.unlink()
        with contextlib.suppress(OSError):
            entry.rmdir()
    else:
        entry.unlink(missing_ok=True)
    sync_folder(entry.parent)


def _walk(run_dir: Path, folder: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """(entry, whether a run writes such a one) of everything below, a folder before what is in it.

    A link is no run's, but for those that W&B makes, and is never followed.
    """
    for entry in sorted((folder or run_dir).iterdir()):
        name = entry.relative_to(run_dir).as_posix()
        if entry.is_symlink():
            yield entry, name.startswith("wandb/")
        elif entry.is_dir():
            yield entry, _RUN_FOLDERS.fullmatch(name) is not None
            yield from _walk(run_dir, entry)
        else:
            yield entry, RUN_FILES.fullmatch(name) is not None


def add_note(error: BaseException, note: str) -> None:
    """What `BaseException.add_note` does, in Python 3.10 as well."""
    error.__dict__.setdefault("__notes__", []).append(note)


def error_notes(error: BaseException) -> list[str]:
    """The notes on an error."""
    return [str(note) for note in getattr(error, "__notes__", [])]


def one_line(error: BaseException) -> str:
    """An error's message as one line, behind its type where that is not one of bad input."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"  # without the number
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError, ArithmeticError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}".removesuffix(": ")
