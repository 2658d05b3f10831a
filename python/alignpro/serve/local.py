"""A model in this process as what answers: chat completions, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import reprlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote

from alignpro.models.engine_thread import EngineThread
from alignpro.models.native_model import NativeModel
from alignpro.models.tokenizer import count_words
from alignpro.serve.messages import (
    CHAT,
    Answer,
    Headers,
    Outgoing,
    error_body,
    json_headers,
    segments,
)
from alignpro.types import Completion, SamplingParams, text_messages

_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
# Of a request, in the words of OpenAI, and of vLLM where they have none.
_NUMBERS = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    "top_k": int,
}
# What an answer would differ by, and this engine does not do; and what asks for nothing else.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "logprobs", "top_logprobs", "logit_bias"), ()),
    **dict.fromkeys(("audio", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_MOST_ANSWERS = 128


class _BadRequest(ValueError):
    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class _Chat:
    """A chat request, read."""

    tokens: list[int]
    params: SamplingParams
    stream: bool
    include_usage: bool
    number: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


class LocalUpstream:
    """Answers by ``model``; requests decode in one batch."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._engine = EngineThread(model)

    async def send(self, request: Outgoing) -> Answer:
        """See `Upstream.send`."""
        path = request.path.partition(b"?")[0]
        if request.method in ("GET", "HEAD") and (path + b"/").startswith(b"/models/"):
            return self._models(unquote(path.removeprefix(b"/models").removeprefix(b"/").decode()))
        if (request.method, segments(path)) != ("POST", CHAT):
            what = f"{request.method} /v1{path.decode(errors='replace')}"
            return _whole(404, error_body(f"{what}: no such endpoint", "invalid_request_error"))
        assert isinstance(request.body, bytes)
        try:
            chat = await asyncio.to_thread(self._read, request.body)
            return await self._answer(chat)
        except _BadRequest as error:
            message = str(error)
            body = error_body(message, "invalid_request_error", error.code, error.param)
            return _whole(error.status, body)
        except ValueError as error:  # the engine's, of a parameter
            return _whole(400, error_body(str(error), "invalid_request_error"))
        except ArithmeticError as error:  # NumericError
            return _whole(500, error_body(str(error), "server_error"))

    async def close(self) -> None:
        self._engine.close()

    def _models(self, name: str) -> Answer:
        """The card of the model, or the list of it."""
        card = {"id": self._model.name, "object": "model", "created": 0, "owned_by": "alignpro"}
        if name not in ("", self._model.name):
            message = f"model {name!r}: expected {self._model.name!r}"
            body = error_body(message, "invalid_request_error", "model_not_found", "model")
            return _whole(404, body)
        listed = card if name else {"object": "list", "data": [card]}
        return _whole(200, json.dumps(listed).encode())

    def _read(self, raw: bytes) -> _Chat:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _BadRequest(f"expected a body of JSON: {error}") from None
        if not isinstance(body, dict):
            raise _BadRequest("expected a body that is a JSON object")
        if body.get("model") != self._model.name:
            message = f"model {body.get('model')!r}: expected {self._model.name!r}"
            raise _BadRequest(message, "model", "model_not_found", 404)
        for name, ordinary in _NOT_HERE.items():
            if body.get(name) and body[name] not in ordinary:
                only = "".join(f"; {json.dumps(value)} is" for value in ordinary)
                message = f"{name}: {reprlib.repr(body[name])} is not supported{only}"
                raise _BadRequest(message, name, "unsupported_parameter")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise _BadRequest("messages: expected a list of at least one", "messages")
        try:
            tokens = self._model.tokenizer.encode_chat(
                text_messages(body["messages"]), most=self._model.context_length
            )
        except ValueError as error:
            raise _BadRequest(f"messages: {error}", "messages") from None
        options = body.get("stream_options") or {}
        if not isinstance(options, Mapping):
            raise _BadRequest(
                f"stream_options: expected an object, got {reprlib.repr(options)}", "stream_options"
            )
        return _Chat(
            tokens,
            self._params(body, len(tokens)),
            _flag(body, "stream"),
            _flag(options, "include_usage"),
        )

    def _params(self, body: Mapping[str, Any], read: int) -> SamplingParams:
        given: dict[str, Any] = {}
        for name, kind in _NUMBERS.items():
            value = body.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise _BadRequest(f"{name}: expected a number, got {reprlib.repr(value)}", name)
            given[name] = value
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise _BadRequest("stop: expected text, or a list of texts", "stop")
        limit = self._model.context_length
        left = limit - read
        most = _count(body, "max_completion_tokens") or _count(body, "max_tokens") or max(left, 1)
        if most > left:
            raise _BadRequest(
                f"the messages are {count_words(read, limit)}, and {most} new ones exceed the "
                f"context of {limit}",
                "messages",
                "context_length_exceeded",
            )
        seed, n = body.get("seed"), _count(body, "n") or 1
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise _BadRequest(f"seed: expected an integer, got {seed!r}", "seed")
        if n > _MOST_ANSWERS:
            raise _BadRequest(f"n: expected at most {_MOST_ANSWERS}, got {n}", "n")
        seed = None if seed is None else seed % 2**64
        return SamplingParams(max_new_tokens=most, stop=tuple(stops), seed=seed, n=n, **given)

    async def _answer(self, chat: _Chat) -> Answer:
        events: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        futures = [self._submit(chat, index, events) for index in range(chat.params.n)]

        async def cancel() -> None:
            for future in futures:
                future.cancel()

        try:
            if chat.stream:
                first = await _first(futures, events)
                return Answer(200, _EVENTS, self._events(chat, futures, events, first), cancel)
            done = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except BaseException:
            await cancel()
            raise
        choices = [
            {"message": {"role": "assistant", "content": one.text}, **_ending(index, one)}
            for index, one in enumerate(done)
        ]
        body = self._head(chat, "chat.completion") | {"choices": choices, "usage": _usage(done)}
        return _whole(200, json.dumps(body).encode())

    def _submit(
        self, chat: _Chat, index: int, events: asyncio.Queue[tuple[int, str | None]]
    ) -> Future[Completion]:
        """Of a stream, its text goes to ``events`` as it comes, and None behind it."""
        if not chat.stream:
            return self._engine.submit(chat.tokens, chat.params, sample=index)
        loop = asyncio.get_running_loop()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, piece))

        return self._engine.stream(chat.tokens, chat.params, put, sample=index)

    async def _events(
        self,
        chat: _Chat,
        futures: list[Future[Completion]],
        events: asyncio.Queue[tuple[int, str | None]],
        first: tuple[int, str | None],
    ) -> AsyncIterator[bytes]:
        """Server-sent events; an error in the middle is one of them, the last."""
        say = partial(self._event, chat)
        for index in range(len(futures)):
            yield say(index, {"role": "assistant", "content": ""})
        event, open_ = first, len(futures)
        while True:
            index, piece = event
            if piece is not None:
                yield say(index, {"content": piece})
            else:
                open_ -= 1
                error = futures[index].exception()
                if error is not None:
                    yield b"data: " + error_body(str(error), "server_error") + b"\n\n"
                    return
                yield say(index, {}, futures[index].result())
            if not open_:
                break
            event = await events.get()
        if chat.include_usage:
            usage = _usage([future.result() for future in futures])
            head = self._head(chat, "chat.completion.chunk")
            yield _data(head | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _event(
        self, chat: _Chat, index: int, delta: dict[str, Any], end: Completion | None = None
    ) -> bytes:
        ending = {"index": index, "finish_reason": None} if end is None else _ending(index, end)
        said: dict[str, Any] = {"choices": [{"delta": delta, **ending}]}
        if chat.include_usage:
            said["usage"] = None  # of the last event alone
        return _data(self._head(chat, "chat.completion.chunk") | said)

    def _head(self, chat: _Chat, kind: str) -> dict[str, Any]:
        name = self._model.name
        return {"id": chat.number, "object": kind, "created": chat.created, "model": name}


async def _first(
    futures: list[Future[Completion]], events: asyncio.Queue[tuple[int, str | None]]
) -> tuple[int, str | None]:
    """The first event; raises what the engine refused, before there is a status."""
    index, piece = await events.get()
    error = futures[index].exception() if piece is None else None
    if error is not None:
        raise error
    return index, piece


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, (bool, type(None))):
        raise _BadRequest(f"{name}: expected true or false, got {reprlib.repr(value)}", name)
    return bool(value)


def _count(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _BadRequest(f"{name}: expected an integer of 1 or more, got {value!r}", name)
    return value


def _ending(index: int, completion: Completion) -> dict[str, Any]:
    return {"index": index, "finish_reason": completion.finish_reason, "logprobs": None}


def _usage(completions: list[Completion]) -> dict[str, int]:
    read = len(completions[0].prompt_tokens)
    written = sum(one.num_tokens for one in completions)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def _data(event: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _whole(status: int, body: bytes) -> Answer:
    async def chunks() -> AsyncIterator[bytes]:
        yield body

    async def close() -> None:
        pass

    return Answer(status, json_headers(body), chunks(), close)
