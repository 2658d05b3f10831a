"""Calls to an endpoint and their answers, in a file of JSON lines from which they are replayed.

A call is known by everything that it asks for and by its draw. Requests that brought no answer are
written down as well, with what they took; what the endpoint made of the parameters; and where a run
went on without an answer, the reason.

One process adds to a file, from its first new call on; others may read it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignpro.files import append_line, hold_file, read_kept
from alignpro.models.reply import Answer

CHAT, SCORE = "chat/completions", "completions"


@dataclass(frozen=True)
class Call:
    """One request, as it is known: before it is put into the endpoint's own words."""

    body: dict[str, Any]
    seed: int
    sample: int
    path: str = CHAT  # below the endpoint's address; SCORE: of given tokens

    @property
    def key(self) -> str:
        asked = asdict(self)
        if self.path == CHAT:
            del asked["path"]
        plain = json.loads(json.dumps(asked))  # keys that are numbers are sorted as the texts
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class CallFile:
    """Answers by call. Without a path they are kept in memory alone.

    Holds requests and answers as they are, and never a key.

    Raises:
        ValueError: a line that is no call; a last line that a crash cut short is passed over.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.replayed = 0
        self._lock = threading.RLock()
        self._held: _Held | None = None
        self._read(repair=False)

    def _read(self, *, repair: bool) -> None:
        self._known: dict[str, Answer | str] = {}  # a text: why there is none
        self.changes: dict[str, dict[str, str | None]] = {}  # by path; see `dialect.Dialect`
        # Of all that is written down: requests sent, and tokens read and written.
        self.attempts = self.input_tokens = self.output_tokens = 0
        self._as_read: object = None
        if self.path is not None and self.path.exists():
            before = _status(self.path)
            take, expected = self._take_kept, "a recorded call with the request that it was made by"
            if read_kept(self.path, take, expected, repair=repair):
                self._as_read = before

    def hold(self) -> bool:
        """Take the file, to add to it, and read what others did meanwhile: whether there is such.

        Raises:
            FileExistsError: another process adds to it.
        """
        with self._lock:
            if self._held is not None or self.path is None:
                return False
            self._held = _Held.of(self.path)
            if not self.path.exists() or _status(self.path) == self._as_read:
                return False
            self._read(repair=True)
            return True

    def __len__(self) -> int:
        return len(self._known)

    def get(self, call: Call) -> Answer | str | None:
        """The answer, or why the run went on without one; None for a call that is not known."""
        known = self._known.get(call.key)
        self.replayed += known is not None
        return known

    def put(self, call: Call, answer: Answer, *, seconds: float) -> None:
        row = {
            "key": call.key,
            "request": call.body,
            "seed": call.seed,
            "sample": call.sample,
            "answer": {name: value for name, value in asdict(answer).items() if value != []},
            "attempts": 1,
            "seconds": round(seconds, 3),
        }
        self._add(row)

    def put_unanswered(self, call: Call, reason: str, read: int, written: int) -> None:
        """A request that brought no answer, and what it took; the call is asked again."""
        tokens = {"input_tokens": read, "output_tokens": written}
        self._add({"key": call.key, "unanswered": reason, "attempts": 1, **tokens})

    def put_failure(self, call: Call, reason: str) -> None:
        """That a run went on without an answer; once, however often that is replayed."""
        if self._known.get(call.key) == reason:
            return
        draw = {"seed": call.seed, "sample": call.sample}
        self._add({"key": call.key, "request": call.body, **draw, "failed": reason})

    def put_changes(self, path: str, changes: dict[str, str | None]) -> None:
        """What the endpoint refuses at a path, and what is sent instead."""
        self._add({"changes": changes} | ({} if path == CHAT else {"path": path}))

    def _add(self, row: dict[str, Any]) -> None:
        with self._lock:
            self.hold()
            self._take(row)
            if self.path is not None:
                append_line(self.path, json.dumps(row))

    def _take_kept(self, number: int, row: dict[str, Any]) -> None:
        if "request" in row and "seed" in row:  # failures of older files have none
            path = SCORE if "prompt" in row["request"] else CHAT
            if Call(row["request"], row["seed"], row["sample"], path).key != row["key"]:
                raise ValueError(row["key"])  # the request was edited, and its answer is another's
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        if "changes" in row:
            self.changes[row.get("path", CHAT)] = dict(row["changes"])
        elif "failed" in row:
            self._known[row["key"]] = str(row["failed"])
        else:
            took = row
            if "unanswered" not in row:
                took = row["answer"]
                self._known[row["key"]] = _checked(Answer(**took))
            self.attempts += int(row["attempts"])  # in older files those before it as well
            self.input_tokens += took["input_tokens"] or 0
            self.output_tokens += took["output_tokens"] or 0


def _status(path: Path) -> object:
    """Another one after any change of the file."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Held:
    """A file that this process adds to, for as long as somebody refers to it: a target and a judge
    may share one."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, hold_file(path))

    @classmethod
    def of(cls, path: Path) -> _Held:
        name = os.path.realpath(path)
        with _holding:
            held = _held.get(name)
            if held is None:
                held = _held[name] = cls(Path(name))
        return held


_held: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()
_holding = threading.Lock()


def _checked(answer: Answer) -> Answer:
    """Raises ValueError for what no reply was read as: somebody else wrote it."""
    texts = isinstance(answer.text, str) and isinstance(answer.reasoning, str)
    if not texts or answer.finish_reason not in ("stop", "length"):
        raise ValueError(answer)
    return answer
