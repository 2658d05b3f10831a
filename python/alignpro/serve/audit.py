"""A record of what was rewritten and why not: JSON lines, rotated, with texts where asked for."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from typing import Any

from alignpro.config.serve import AuditConfig

_log = logging.getLogger(__name__)


class _Private(RotatingFileHandler):
    """Files that others cannot read."""

    def _open(self) -> Any:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=opener)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        _log.error("audit.path: %s: a line is lost: %s", self.baseFilename, error.strerror)


class AuditLog:
    """A line a chat request. Headers, and so keys, are never in it. A disk that is full costs lines
    and no request.

    Raises:
        OSError: the file cannot be written; the message names ``audit.path``.
    """

    def __init__(self, config: AuditConfig) -> None:
        assert config.path is not None
        self._texts = config.texts
        try:
            self._file = _Private(
                config.path, maxBytes=config.max_bytes, backupCount=config.files, encoding="utf-8"
            )
        except OSError as error:
            raise type(error)(
                f"audit.path: expected a file in a folder that is there and may be written to, "
                f"got {config.path}: {error.strerror}"
            ) from None

    def write(self, fields: dict[str, Any], *, prompt: str, rewrite: str) -> None:
        """The texts, of the last turn and of what the prompter wrote, where they are asked for."""
        now = datetime.datetime.now(datetime.timezone.utc)
        row = {"time": now.isoformat(timespec="milliseconds"), **fields}
        if self._texts:
            row |= {"prompt": prompt, "rewrite": rewrite}
        line = json.dumps(row)
        self._file.emit(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the lines that were lost
            self._file.close()
