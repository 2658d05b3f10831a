"""The proxy: a request in, perhaps rewritten, to what answers, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from alignpro import trace
from alignpro.config.serve import ServeConfig
from alignpro.rewriting import beside
from alignpro.serve.audit import AuditLog
from alignpro.serve.chat_body import ChatBody
from alignpro.serve.messages import (
    CHAT,
    PREFIX,
    Answer,
    Headers,
    Outgoing,
    Upstream,
    UpstreamError,
    end_to_end,
    error_body,
    json_headers,
    segments,
)
from alignpro.serve.metrics import ServeMetrics
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.routes import Mode, Routes, asked_mode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger(__name__)
ONE_MORE = "alignpro.one_more"  # in a scope's extensions: of a connection beyond the most
_V1 = re.compile(rb"/(?:v|%76)(?:1|%31)")
_AT_ONCE = 2**15  # bytes of a body that is read, and written, in less than a millisecond


class _Refused(Exception):
    """The request is answered here."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _ClientGone(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class _Outcome:
    """What a chat's answer says of its rewrite."""

    mode: Mode
    run: str = ""
    applied: bool = False
    reason: str = "off"
    milliseconds: float = 0.0

    @property
    def headers(self) -> Headers:
        said = {
            "applied": str(self.applied).lower(),
            "reason": self.reason,
            "rewrite-ms": f"{self.milliseconds:.1f}",
            "run": self.run,
        }
        return [(PREFIX + b"-" + k.encode(), v.encode()) for k, v in said.items()]


class Proxy:
    """The ASGI application of everything under /v1/."""

    def __init__(
        self,
        config: ServeConfig,
        upstream: Upstream,
        routes: Routes,
        audit: AuditLog | None = None,
    ) -> None:
        self.metrics = ServeMetrics()
        self._config, self._upstream = config, upstream
        self._routes, self._audit = routes, audit
        self._shadows: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"expected HTTP, got {scope['type']}")
        arrived = asyncio.Event()  # all of the request
        work = self._respond(scope, _Body(receive, arrived), send)
        with self.metrics.under_way.track_inprogress(), trace.span("request"):
            try:
                if not await _while_connected(work, receive, arrived):
                    self.metrics.cut.labels("client").inc()
            except asyncio.CancelledError:
                _log.warning("%s %s: the server ended first", scope["method"], scope["path"])

    async def _respond(self, scope: Scope, body: _Body, send: Send) -> None:
        try:
            request, outcome = await self._request(scope, body)
            with trace.span("upstream"):
                answer = await self._upstream.send(request)
        except _ClientGone:
            self.metrics.cut.labels("client").inc()
            return
        except _Refused as refusal:
            kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
            await _refuse(send, refusal.status, str(refusal), kind, refusal.code)
            return
        except UpstreamError as error:
            _log.warning("%s %s: %s", scope["method"], scope["path"], error)
            self.metrics.answers.labels(str(error.status)).inc()
            await _refuse(send, error.status, str(error), "upstream_error", "upstream_error")
            return
        self.metrics.answers.labels(str(answer.status)).inc()
        with trace.span("relay"):
            await self._relay(answer, outcome, send)

    async def _request(self, scope: Scope, body: _Body) -> tuple[Outgoing, _Outcome | None]:
        """What is sent on, and, of a chat, what became of its rewrite."""
        if ONE_MORE in scope.get("extensions", {}):
            most = self._config.max_connections
            message = f"{most} connections are open; serve's max_connections allows more"
            raise _Refused(503, message, "too_many_connections")
        path = _path_behind_v1(scope)
        codings = [v.lower() for name, v in scope["headers"] if name == b"transfer-encoding"]
        if any(coding != b"chunked" for coding in codings):
            raise _Refused(501, "transfer-encoding: expected chunked alone", "not_supported")
        headers = end_to_end(scope["headers"], b"host", b"expect")
        method = scope["method"]
        if (method, segments(path)) != ("POST", CHAT):
            streamed = any(
                name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]
            )
            if streamed and not any(name == b"content-length" for name, _ in headers):
                headers.append((b"transfer-encoding", b"chunked"))
            if not streamed:
                body.arrived.set()
            chunks = body.chunks(self._config.receive_seconds) if streamed else b""
            return Outgoing(method, path, headers, chunks), None
        with trace.span("receive"):
            said = [int(value) for name, value in scope["headers"] if name == b"content-length"]
            _check_size(max(said, default=0), self._config.max_body)  # before it is asked for
            raw = await body.whole(self._config.max_body, self._config.receive_seconds)
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        raw, outcome = await self._rewritten(raw, scope)
        return Outgoing(method, path, headers, raw), outcome

    async def _rewritten(self, raw: bytes, scope: Scope) -> tuple[bytes, _Outcome]:
        """The body that is sent on: the one that came, unless it is rewritten in time."""
        asked = [value for name, value in scope["headers"] if name == PREFIX]
        mode = asked_mode(asked) if asked else None
        if asked and mode is None:
            return raw, self._noted(_Outcome("off", reason="bad_header"), ChatBody(raw))
        if mode == "off" or (mode is None and self._routes.is_off):
            return raw, self._noted(_Outcome("off"), ChatBody(raw))
        if any(name == b"content-encoding" for name, _ in scope["headers"]):
            return raw, self._noted(_Outcome(mode or "on", reason="encoded"), ChatBody(raw))
        with trace.span("read body"):
            chat = await beside(len(raw) > _AT_ONCE, ChatBody.read, raw)
        with trace.span("route"):
            route = self._routes.of(chat.model)
        mode = mode or route.mode
        if mode == "off":
            return raw, self._noted(_Outcome(mode), chat)
        if not route.rewriters:
            return raw, self._noted(_Outcome(mode, reason="no_run"), chat)
        if chat.conversation is None:
            return raw, self._noted(_Outcome(mode, reason=chat.reason), chat)
        with trace.span("route"):
            rewriter = route.rewriter(chat.conversation)
        rewriting = self._rewrite(mode, rewriter, chat)
        if mode == "shadow":
            shadow = asyncio.create_task(rewriting)
            self._shadows.add(shadow)
            shadow.add_done_callback(self._shadows.discard)
            return raw, _Outcome(mode, rewriter.name, reason="shadow")
        new, outcome = await rewriting
        return (raw if new is None else new), outcome

    async def _rewrite(
        self, mode: Mode, rewriter: Rewriter, chat: ChatBody
    ) -> tuple[bytes | None, _Outcome]:
        """The rewritten body, if there is one, and what became of it."""
        assert chat.conversation is not None
        result = await rewriter.rewrite(chat.conversation)
        self.metrics.rewrite_seconds.labels(rewriter.name).observe(result.milliseconds / 1e3)
        reason, new = result.reason, None
        if result.applied:
            with trace.span("write body"):
                turn = result.messages[-1]["content"]
                is_large = len(chat.raw) > _AT_ONCE
                new = await beside(is_large, chat.with_last_turn, turn)
            reason = "several_texts" if new is None else reason
        applied = new is not None and mode == "on"
        outcome = _Outcome(mode, rewriter.name, applied, reason, result.milliseconds)
        return new, self._noted(outcome, chat, result.text)

    def _noted(self, outcome: _Outcome, chat: ChatBody, written: str = "") -> _Outcome:
        """Counted, and in the audit log."""
        applied = str(outcome.applied).lower()
        self.metrics.chats.labels(outcome.run, outcome.mode, applied, outcome.reason).inc()
        if self._audit is not None:
            turn = "" if chat.conversation is None else chat.conversation.last_turn
            fields = asdict(outcome) | {"model": chat.model}
            self._audit.write(fields, prompt=turn, rewrite=written)
        return outcome

    async def reload(self) -> dict[str, str]:
        """Read every run's adapter again, while requests go on; an error leaves the one in use."""
        said = {}
        for rewriter in self._routes.rewriters:
            try:
                await rewriter.reload()
                said[rewriter.name] = "reloaded"
            except (OSError, ValueError) as error:
                said[rewriter.name] = str(error)
            _log.warning("%s: %s", rewriter.name, said[rewriter.name])
        return said

    async def _relay(self, answer: Answer, outcome: _Outcome | None, send: Send) -> None:
        """One that the upstream breaks off is broken off here, too: it is not ended."""
        headers = answer.headers + (outcome.headers if outcome is not None else [])
        try:
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for chunk in answer.body:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except UpstreamError as error:
            _log.warning("%s", error)
            self.metrics.cut.labels("upstream").inc()
            return
        finally:
            await answer.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def close(self) -> None:
        for shadow in list(self._shadows):
            shadow.cancel()
        await self._upstream.close()
        for rewriter in self._routes.rewriters:
            rewriter.close()
        if self._audit is not None:
            self._audit.close()


class _Body:
    """The body of a request as it arrives; ``arrived`` is set when there is no more."""

    def __init__(self, receive: Receive, arrived: asyncio.Event) -> None:
        self._receive, self.arrived = receive, arrived

    async def chunks(self, seconds: float | None = None) -> AsyncIterator[bytes]:
        """At most ``seconds`` apart."""
        more = True
        while more:
            try:
                message = await asyncio.wait_for(self._receive(), seconds)
            except asyncio.TimeoutError:
                raise _Refused(408, f"nothing of the body arrived for {seconds:g} s") from None
            if message["type"] == "http.disconnect":
                raise _ClientGone
            more = bool(message.get("more_body"))
            if not more:
                self.arrived.set()
            yield message.get("body", b"")

    async def whole(self, most: int, seconds: float) -> bytes:
        async def read() -> bytes:
            parts, size = [], 0
            async for chunk in self.chunks():
                parts.append(chunk)
                size += len(chunk)
                _check_size(size, most)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise _Refused(408, f"the body did not arrive within {seconds:g} s") from None


def _check_size(size: int, most: int) -> None:
    if size > most:
        message = f"the body has more than {most} bytes; serve's max_body allows more"
        raise _Refused(413, message, "request_too_large")


async def _while_connected(
    work: Coroutine[Any, Any, None], receive: Receive, arrived: asyncio.Event
) -> bool:
    """Do the work; False: the client left before it was done, and it was cancelled."""

    async def until_gone() -> None:
        await arrived.wait()
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            return False
        task.result()
        return True
    finally:
        gone.cancel()
        if not task.done():  # the server is at its end
            task.cancel()
            await asyncio.wait((task,))


def _path_behind_v1(scope: Scope) -> bytes:
    """As it came, with its query. Raises _Refused for one that would leave /v1."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = _V1.sub(b"", raw.partition(b"?")[0], count=1)
    if ".." in segments(path):
        raise _Refused(404, "expected a path without '..'", "not_found")
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


async def _refuse(send: Send, status: int, message: str, kind: str, code: str | None) -> None:
    body = error_body(message, kind, code)
    headers = json_headers(body)
    if kind != "upstream_error":  # the rest of the request may never come
        headers.append((b"connection", b"close"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make_app(proxy: Proxy) -> Starlette:
    """The application: what is relayed, and what is the server's own."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def reload(request: Request) -> Response:
        client = request.client
        if client is None or not ipaddress.ip_address(client.host).is_loopback:
            return JSONResponse({"error": "only from this machine"}, 403)
        return JSONResponse(await proxy.reload())

    async def metrics(_: Request) -> Response:
        return Response(proxy.metrics.text(), media_type=proxy.metrics.content_type)

    async def not_here(request: Request, _: Exception) -> Response:
        what = f"{request.method} {request.url.path}: expected a path under /v1/"
        body = error_body(f"{what}; clients' base_url ends in /v1", "invalid_request_error")
        return Response(body, 404, media_type="application/json")

    async def failed(_: Request, __: Exception) -> Response:
        body = error_body("an error of this server, whose log has the traceback", "server_error")
        return Response(body, 500, media_type="application/json")

    application = Starlette(
        exception_handlers={404: not_here, 500: failed},
        routes=[
            Route("/health", health),
            Route("/ready", health),  # it listens when everything is loaded
            Route("/metrics", metrics),
            Route("/admin/reload", reload, methods=["POST"]),
            Mount("/v1", proxy),
        ],
    )
    application.router.redirect_slashes = False
    return application
