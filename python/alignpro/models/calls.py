"""Calls to an endpoint and their answers, in a file of JSON lines from which they are replayed.

A call is known by everything that it asks for and by its draw. Requests that brought no answer are
written down as well, with what they took; what the endpoint made of the parameters; and where a run
went on without an answer, the reason.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignpro.files import append_line, read_kept
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
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class CallFile:
    """Answers by call. Without a path they are kept in memory alone.

    Holds requests and answers as they are, and never a key.

    Raises:
        ValueError: a line that is no call; a last line that a crash cut short is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.replayed = 0
        self._known: dict[str, Answer | str] = {}  # a text: why there is none
        self.changes: dict[str, dict[str, str | None]] = {}  # by path; see `dialect.Dialect`
        # Of all that is written down: requests sent, and tokens read and written.
        self.attempts = self.input_tokens = self.output_tokens = 0
        self._lock = threading.Lock()
        if path is not None and path.exists():
            read_kept(path, lambda number, row: self._take(row), "a recorded call")

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
        self._add({"key": call.key, "request": call.body, "failed": reason})

    def put_changes(self, path: str, changes: dict[str, str | None]) -> None:
        """What the endpoint refuses at a path, and what is sent instead."""
        self._add({"changes": changes} | ({} if path == CHAT else {"path": path}))

    def _add(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._take(row)
            if self.path is not None:
                append_line(self.path, json.dumps(row))

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


def _checked(answer: Answer) -> Answer:
    """Raises ValueError for what no reply was read as: somebody else wrote it."""
    texts = isinstance(answer.text, str) and isinstance(answer.reasoning, str)
    if not texts or answer.finish_reason not in ("stop", "length"):
        raise ValueError(answer)
    return answer
