"""A prompter in the path: within its deadline, while it works, and never at a request's cost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from alignpro.config.serve import ServeConfig
from alignpro.prompter import Prompter
from alignpro.rewriting import Rewritten
from alignpro.types import Conversation

_log = logging.getLogger(__name__)
_FAILURES = ("deadline", "error")


class Circuit:
    """Closed until so many failures follow each other; then open for so long, after which one
    attempt may close it."""

    def __init__(
        self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock = failures, seconds, clock
        self._failures = 0
        self._open_until = 0.0

    def allows(self) -> bool:
        """Whether an attempt may be made. Of an open circuit, the first after its time."""
        if self._failures < self._most:
            return True
        now = self._clock()
        if now < self._open_until:
            return False
        self._open_until = now + self._seconds  # until this attempt has ended
        return True

    def tell(self, failed: bool) -> None:
        """What came of an attempt."""
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= self._most:
            self._open_until = self._clock() + self._seconds


class Rewriter:
    """One run's prompter behind a deadline, a queue and a circuit.

    Beside the reasons of `Rewritten` there are "queue_full", "circuit_open", and "unfit": the
    conversation does not fit the prompter's context, or its template.
    """

    def __init__(self, name: str, prompter: Prompter, config: ServeConfig) -> None:
        self.name = name
        self.under_way = 0
        self._prompter = prompter
        self._deadline, self._most = config.deadline_seconds, config.max_queue
        self._circuit = Circuit(config.circuit_failures, config.circuit_seconds)

    async def rewrite(self, conversation: Conversation) -> Rewritten:
        """Raises nothing but CancelledError."""
        if self.under_way >= self._most:
            return Rewritten.original(conversation, "queue_full")
        if not self._circuit.allows():
            return Rewritten.original(conversation, "circuit_open")
        self.under_way += 1
        try:
            result = await self._prompter.arewrite(conversation, deadline=self._deadline)
        except ValueError as error:
            _log.info("%s: no rewrite: %s", self.name, error)
            return Rewritten.original(conversation, "unfit")
        except Exception:
            _log.exception("%s: no rewrite", self.name)
            result = Rewritten.original(conversation, "error")
        finally:
            self.under_way -= 1
        self._circuit.tell(result.reason in _FAILURES)
        return result

    async def reload(self) -> None:
        """See `Prompter.reload`."""
        await asyncio.to_thread(self._prompter.reload)

    def close(self) -> None:
        self._prompter.close()
