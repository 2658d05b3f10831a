"""Requests to an endpoint and its answers, as bytes: nothing is decoded, and nothing buffered.

The transport of httpx2 alone: a client of it would follow redirects, keep cookies and add headers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx2

from alignpro.serve.messages import Answer, Headers, Outgoing, UpstreamError, end_to_end

# Seconds; servers close idle connections after 5 and more, and one that they close as it is used
# costs another attempt.
_KEPT_OPEN = 4.0
_IDLE_CONNECTIONS = 256


class EndpointUpstream:
    """An OpenAI-compatible endpoint; ``url`` is its clients' base_url, to which /v1 is added where
    it is a server's address alone."""

    def __init__(self, url: str, *, connect_seconds: float, idle_seconds: float) -> None:
        address = urlsplit(url)
        self._url = httpx2.URL(url)
        self._path = (address.path.rstrip("/") or "/v1").encode()
        self._host = address.netloc.encode()
        self._timeout = httpx2.Timeout(None, connect=connect_seconds, read=idle_seconds).as_dict()
        self._idle_seconds = idle_seconds
        self._transport = httpx2.AsyncHTTPTransport(
            limits=httpx2.Limits(
                max_connections=None,
                max_keepalive_connections=_IDLE_CONNECTIONS,
                keepalive_expiry=_KEPT_OPEN,
            )
        )

    async def send(self, request: Outgoing) -> Answer:
        """See `Upstream.send`."""
        while True:
            connected = False

            async def trace(event: str, _info: dict[str, Any]) -> None:
                nonlocal connected
                connected = connected or event.startswith("connection.connect")

            try:
                response = await self._transport.handle_async_request(self._asked(request, trace))
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError) as error:
                # It closed a connection that was kept open, before it read the request. There are
                # at most so many of these, and the last attempt makes one.
                if isinstance(request.body, bytes) and not connected:
                    continue
                raise UpstreamError(f"the upstream broke the connection: {_said(error)}") from error
            except httpx2.ConnectTimeout as error:
                raise UpstreamError("the upstream could not be reached in time", 504) from error
            except httpx2.TimeoutException as error:
                message = f"the upstream sent nothing for {self._idle_seconds:g} s"
                raise UpstreamError(message, 504) from error
            except httpx2.TransportError as error:
                raise UpstreamError(f"the upstream cannot be reached: {_said(error)}") from error
            headers = end_to_end(response.headers.raw)
            return Answer(response.status_code, headers, _chunks(response), response.aclose)

    def _asked(self, request: Outgoing, trace: Any) -> httpx2.Request:
        headers: Headers = [(b"host", self._host), *request.headers]
        body = request.body
        if isinstance(body, bytes):
            headers.append((b"content-length", str(len(body)).encode()))
            content: httpx2.AsyncByteStream = httpx2.ByteStream(body)
        else:
            content = _Streamed(body)
        if not body and request.method in ("GET", "HEAD", "OPTIONS", "DELETE"):
            del headers[-1]
        target = self._path + request.path
        return httpx2.Request(
            request.method,
            self._url,
            headers=headers,
            stream=content,
            extensions={"target": target, "timeout": self._timeout, "trace": trace},
        )

    async def close(self) -> None:
        await self._transport.aclose()


class _Streamed(httpx2.AsyncByteStream):
    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk


async def _chunks(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The body as it comes. Raises UpstreamError where it ends early."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    try:
        async for chunk in response.stream:
            yield chunk
    except httpx2.TransportError as error:
        raise UpstreamError(f"the upstream's answer ended early: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
