"""Chat completions over HTTP: so many at a time, so often, for so long, again, and for so much.

One event loop, in a thread of its own, has every call under way; the seam outside of it is
synchronous (`endpoint.EndpointClient`).

The client is httpx2: maintained, with an asynchronous side whose calls end when they are cancelled,
and installed with tokenizers already. Retries are written here: a library for them (tenacity,
stamina) knows neither a pause that all calls keep (Retry-After) nor a refusal that changes the
request.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import os
import random
import re
import threading
import time
import urllib.parse
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alignpro.config import Budget, ModelConfig
from alignpro.models.calls import CHAT, SCORE, Call, CallFile
from alignpro.models.dialect import Dialect
from alignpro.models.language_model import RequestError
from alignpro.models.reply import Answer, one_line, read_reply, read_scores, read_usage

if TYPE_CHECKING:
    import httpx2

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts; each twice the last
_LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more has no answer for us
_REFUSALS = (400, 422, 501)  # of what a request asks for; the last is llama.cpp's
_SECRET = 12  # characters; shorter keys are placeholders ("EMPTY"), and may be words of an answer
_BUDGET_POLL = 0.05  # seconds between looks at whether a call under way left some of a budget
_BYTES_PER_TOKEN = 3.0  # of text; a low guess, to reserve enough of a budget


class EndpointError(RuntimeError):
    """The endpoint refuses every call: the key, the model or the account. It ends the run."""


class BudgetError(RuntimeError):
    """The budget of an endpoint is spent. It ends the run, which can be resumed."""


class _Again(Exception):
    """An attempt failed in a way that passes."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds


class HttpClient:
    """The calls to one endpoint."""

    def __init__(self, config: ModelConfig, calls: CallFile) -> None:
        assert config.endpoint is not None
        self._url = config.endpoint.rstrip("/").removesuffix(f"/{CHAT}")
        self._name, self._key_env, self._options = config.name, config.api_key_env, config.client
        self._calls = calls
        # Of each path: what one does not know, another may.
        self._dialects = {path: Dialect(calls.changes.get(path, {})) for path in (CHAT, SCORE)}
        self._budget = _Account(config.client.budget, config, calls)
        self._key = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def read_key(self) -> str:
        """The key, from its environment variable; none of the messages shows it.

        Raises:
            ValueError: the variable is not set, or what is in it cannot be a key.
        """
        if self._key_env is None:
            return ""
        key = os.environ.get(self._key_env, "").strip()
        where = f"api_key_env: the environment variable {self._key_env}"
        if not key:
            raise ValueError(f"{where} is not set; set it, or api_key_env=null for no key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(f"{where}: expected a key of printable characters without spaces")
        return key

    def start(self, call: Call) -> Future[Answer]:
        """Put a call under way."""
        with self._starting:
            if self._loop is None:
                self._key = self.read_key()
                http = self._client()
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, daemon=True, name="endpoint").start()
                asyncio.run_coroutine_threadsafe(self._open(http), loop).result()
                self._loop = loop
                weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False
        future: Future[Answer] = Future()
        self._loop.call_soon_threadsafe(self._begin, call, future)
        return future

    def _client(self) -> httpx2.AsyncClient:
        """Raises EndpointError where the environment names no proxy or certificates that are."""
        import httpx2

        options = self._options
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # A connection is for one call: on a kept one, the second copy of a reply that a server
        # or a proxy sends twice is the next call's answer (measured: docs/notes/endpoints.md).
        limits = httpx2.Limits(max_connections=options.concurrency, max_keepalive_connections=0)
        host = urllib.parse.urlsplit(self._url).hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        try:
            return httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(None, connect=options.connect_seconds),
                limits=limits,
                # With one of its own it asks no proxy, and none reaches what is on this machine.
                transport=httpx2.AsyncHTTPTransport(limits=limits) if here else None,
            )
        except (ImportError, ValueError, OSError) as error:
            socks = isinstance(error, ImportError)
            reason = "a SOCKS proxy needs `pip install socksio`" if socks else str(error)
            raise EndpointError(
                f"{self._name} at {self._url}: {reason} (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or "
                "SSL_CERT_FILE of the environment; NO_PROXY=HOST asks without a proxy)"
            ) from None

    # --- on the loop ---

    def _begin(self, call: Call, future: Future[Answer]) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._settle(call, future))
        self._tasks.add(task)  # the loop's own reference is a weak one
        task.add_done_callback(self._tasks.discard)

        def cancel(future: Future[Answer]) -> None:
            if future.cancelled():
                loop.call_soon_threadsafe(task.cancel)

        future.add_done_callback(cancel)

    async def _settle(self, call: Call, future: Future[Answer]) -> None:
        try:
            answer = await self._answer(call)
        except Exception as error:
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(answer)

    async def _open(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._slots = asyncio.Semaphore(self._options.concurrency)
        self._first = {path: asyncio.Lock() for path in self._dialects}
        self._first_is_done: set[str] = set()  # of these paths
        self._next_turn = self._not_before = 0.0  # in the loop's time

    async def _answer(self, call: Call) -> Answer:
        """What the endpoint refuses is learnt by the first call of a path, which goes alone."""
        if call.path not in self._first_is_done:
            async with self._first[call.path]:
                if call.path not in self._first_is_done:
                    try:
                        return await self._attempts(call)
                    finally:
                        self._first_is_done.add(call.path)
        return await self._attempts(call)

    async def _attempts(self, call: Call) -> Answer:
        failures = 0
        started = time.monotonic()
        while True:
            try:
                async with self._slots:
                    await self._turn()
                    with await self._budget.reserve(call):
                        answer = await self._recorded(call, started)
                    if answer is not None:
                        return answer
            except _Again as error:
                failures += 1
                if failures > self._options.max_retries:
                    times = "1 attempt" if failures == 1 else f"{failures} attempts"
                    raise RequestError(f"{error} ({times})") from None
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (failures - 1))
                await asyncio.sleep(max(error.pause, longest * random.uniform(0.5, 1.0)))

    async def _recorded(self, call: Call, started: float) -> Answer | None:
        """One attempt, written down with what it took before its budget is given back."""
        replies: list[object] = []
        try:
            answer = await self._attempt(call, replies)
        except BaseException as error:
            # A completion without an answer, of an endpoint that does not say: the most it may be.
            most = (_tokens_read(call), _most_written(call)) if replies else (0, 0)
            told = read_usage(replies[0]) if replies else (0, 0)
            took = (m if t is None else t for t, m in zip(told, most, strict=True))
            self._calls.put_unanswered(call, str(error) or type(error).__name__, *took)
            raise
        if answer is None:
            self._calls.put_unanswered(call, "a parameter was refused", 0, 0)
            return None
        answer = _with_tokens(answer, call)
        self._calls.put(call, answer, seconds=time.monotonic() - started)
        return answer

    async def _turn(self) -> None:
        """Wait for the pause that the endpoint asked for, and for the next call of this minute."""
        loop = asyncio.get_running_loop()
        if self._options.requests_per_minute is not None:
            begin = max(loop.time(), self._next_turn)
            self._next_turn = begin + 60.0 / self._options.requests_per_minute
            await asyncio.sleep(begin - loop.time())
        while (pause := self._not_before - loop.time()) > 0:
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call, replies: list[object]) -> Answer | None:
        """None: the endpoint refused a parameter, and will be asked without it. replies: gets what
        was generated for the call, an answer or not."""
        import httpx2

        dialect = self._dialects[call.path]
        sent = dialect.of(call.body)
        try:
            response = await asyncio.wait_for(
                self._exchange(call, sent), self._options.timeout_seconds
            )
        except asyncio.TimeoutError:
            raise _Again(f"no answer within {self._options.timeout_seconds:g} s") from None
        except httpx2.RequestError as error:  # connections, protocol, encodings
            raise _Again(f"{type(error).__name__}: {error}") from None
        content = response.content
        if len(self._key) >= _SECRET:  # which a server may repeat, and nobody is to be shown
            content = content.replace(self._key.encode(), b"***")
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):  # of UTF-8 as well; nested without end
            reply = one_line(content.decode("utf-8", "replace"))
        status = response.status_code
        if 200 <= status < 300:
            if isinstance(reply, dict) and reply.get("choices"):
                replies.append(reply)
            try:
                if call.path == SCORE:
                    return read_scores(reply, len(call.body["prompt"]))
                return read_reply(reply)
            except ValueError as error:
                raise _Again(f"no chat completion: {error}") from None
        self._check_status(status, reply, response)
        if dialect.of(call.body) != sent:  # another call has learnt it
            return None
        learnt = dialect.learn(sent, reply) if status in _REFUSALS else None
        if learnt is None:
            raise RequestError(f"HTTP {status}: {_message(reply)}")
        _log.warning("%s at %s refuses %s", self._name, self._url, learnt)
        self._calls.put_changes(call.path, dialect.changes)
        return None

    async def _exchange(self, call: Call, body: dict[str, Any]) -> httpx2.Response:
        url = f"{self._url}/{call.path}"
        request = self._http.build_request("POST", url, content=json.dumps(body))
        limit = self._options.first_byte_seconds
        try:
            response = await asyncio.wait_for(self._http.send(request, stream=True), limit)
        except asyncio.TimeoutError:
            raise _Again(f"no answer began within {limit:g} s") from None
        try:
            await response.aread()
        finally:
            await response.aclose()
        return response

    def _check_status(self, status: int, reply: object, response: httpx2.Response) -> None:
        """Raise what a status says, but of one that refuses the request itself."""
        message = f"HTTP {status}: {_message(reply)}"
        quota = "insufficient_quota" in str(reply)
        if 300 <= status < 400:  # not followed: it may lead to another server, and the key with it
            place = response.headers.get("location", "elsewhere")
            message = f"HTTP {status}: it sends to {place}; name that address as the endpoint"
        elif status == 404 and "/v1/" not in str(response.url):
            message += "; the address of an OpenAI-compatible endpoint mostly ends in /v1"
        flagged = status == 403 and re.search("moderation|flagged", str(reply), re.IGNORECASE)
        if flagged:  # OpenRouter's word for one prompt, not for the key
            raise RequestError(message)
        if status in (401, 402, 403, 404, 407) or 300 <= status < 400 or quota:
            raise EndpointError(f"{self._name} at {response.url}: {message}")
        if status in (408, 409, 425, 429) or (status >= 500 and status not in _REFUSALS):
            pause = _retry_after(response.headers.get("retry-after"))
            if pause > _LONGEST_RETRY_AFTER:
                raise RequestError(f"{message}; it asks to wait {pause:.0f} s")
            if pause:
                now = asyncio.get_running_loop().time()
                self._not_before = max(self._not_before, now + pause)
            raise _Again(message, pause)


class _Account:
    """What was spent and what calls under way may still spend, so that no budget is passed."""

    def __init__(self, budget: Budget, config: ModelConfig, calls: CallFile) -> None:
        self._budget, self._config, self._calls = budget, config, calls
        self._tokens = [0, 0]  # reserved: to be read, to be written
        self._under_way = 0

    async def reserve(self, call: Call) -> AbstractContextManager[None]:
        """A context for one attempt, when there is enough for it.

        Raises:
            BudgetError: there is not, and no call under way may leave some.
        """
        read = _tokens_read(call)
        written = _most_written(call)
        while (over := self._over(read, written)) is not None:
            if not self._under_way:
                raise BudgetError(
                    f"{self._config.name}: the budget of {over} is spent; raise it and resume: "
                    "what was answered is not asked for again"
                )
            await asyncio.sleep(_BUDGET_POLL)
        self._add(1, read, written)
        return self._held(read, written)

    @contextmanager
    def _held(self, read: int, written: int) -> Iterator[None]:
        try:
            yield
        finally:
            self._add(-1, -read, -written)

    def _add(self, calls: int, read: int, written: int) -> None:
        self._under_way += calls
        self._tokens[0] += read
        self._tokens[1] += written

    def _over(self, read: int, written: int) -> str | None:
        """The budget that one more call may pass."""
        budget, client = self._budget, self._config.client
        read += self._calls.input_tokens + self._tokens[0]
        written += self._calls.output_tokens + self._tokens[1]
        sent = self._calls.attempts + self._under_way
        if budget.calls is not None and sent + 1 > budget.calls:
            return f"{budget.calls} calls"
        if budget.tokens is not None and read + written > budget.tokens:
            return f"{budget.tokens} tokens"
        cost = read * (client.input_price or 0) + written * (client.output_price or 0)
        if budget.cost is not None and cost / 1e6 > budget.cost:
            return f"{budget.cost:g}"
        return None


def _with_tokens(answer: Answer, call: Call) -> Answer:
    """Of an endpoint that does not say them, estimates."""
    read, written = answer.input_tokens, answer.output_tokens
    if read is None:
        read = _tokens_read(call)
    if written is None:
        written = _tokens_in(answer.reasoning + answer.text)
    return replace(answer, input_tokens=read, output_tokens=written)


def _tokens_read(call: Call) -> int:
    """Of a chat a guess, of given tokens their number."""
    if call.path == SCORE:
        return len(call.body["prompt"])
    return _tokens_in(json.dumps(call.body["messages"]))


def _most_written(call: Call) -> int:
    """0 of a call that sets no limit."""
    return int(call.body.get("max_tokens") or call.body.get("max_completion_tokens") or 0)


def _tokens_in(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def _message(reply: object) -> str:
    """What an error reply says, wherever it says it."""
    while isinstance(reply, dict):
        inner = next((reply[k] for k in ("error", "message", "detail") if reply.get(k)), None)
        if inner is None:
            break
        reply = inner
    return one_line(reply)


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or a date; 0 for anything else."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):  # the latter of a year or an offset that is no date's
        return 0.0
