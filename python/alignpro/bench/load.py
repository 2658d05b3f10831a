"""Clients of an HTTP server on this machine, each with one connection, and what they waited."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """One answer."""

    first_byte: float  # seconds until there was some of its body
    seconds: float  # until it had ended
    headers: dict[str, str]  # names in lower case
    body: bytes


class Connection:
    """One that is kept open, with one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes, due: float | None = None, status: int = 200) -> Timed:
        """The answer, timed from now, or from when it was ``due`` (time.perf_counter).

        Raises RuntimeError: another status.
        """
        begin = time.perf_counter() if due is None else due
        self.send(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if f" {status} " not in head[0] + " ":
            raise RuntimeError(f"expected status {status}, got {head[0]!r}")
        if headers.get("transfer-encoding") != "chunked":
            body = await self._reader.readexactly(int(headers["content-length"]))
            end = time.perf_counter() - begin
            return Timed(end, end, headers, body)
        first, chunks = None, []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunks.append(await self._reader.readexactly(size + 2))
            first = first or time.perf_counter() - begin
        await self._reader.readexactly(2)
        end = time.perf_counter() - begin
        return Timed(first or end, end, headers, b"".join(chunk[:-2] for chunk in chunks))

    def send(self, request: bytes) -> None:
        self._writer.write(request)

    def abort(self) -> None:
        """Leave at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def closed_loop(port: int, requests: Iterable[bytes], clients: int) -> list[Timed]:
    """Every client asks the next one as soon as it has its answer."""
    waiting = iter(requests)
    answers = []

    async def client(connection: Connection, number: int) -> None:
        for request in waiting:
            answers.append(await connection.ask(request))

    await _each(port, clients, client)
    return answers


async def paced(
    port: int, requests: Sequence[bytes], clients: int, rate: float, seed: int = 0
) -> list[Timed]:
    """Every client asks at a fixed interval, so that together they ask ``rate`` times a second,
    however long answers take; the clients' phases are drawn.

    A request that had to wait for its client's answer before counts from when it was due.
    """
    interval = clients / rate
    draw = random.Random(seed)
    start = time.perf_counter() + 0.05  # by then all are connected
    begins = [start + draw.random() * interval for _ in range(clients)]
    answers = []

    async def client(connection: Connection, number: int) -> None:
        for turn, request in enumerate(requests[number::clients]):
            due = begins[number] + turn * interval
            left = due - time.perf_counter()
            if left > 0:
                await asyncio.sleep(left)
            # What a timer is late by is no part of an answer's time.
            answers.append(await connection.ask(request, None if left > 0 else due))

    await _each(port, clients, client)
    return answers


async def _each(
    port: int, clients: int, client: Callable[[Connection, int], Coroutine[Any, Any, None]]
) -> None:
    connections = [await Connection.open(port) for _ in range(clients)]
    try:
        await asyncio.gather(*(client(each, number) for number, each in enumerate(connections)))
    finally:
        for connection in connections:
            await connection.close()
