"""An OpenAI-compatible endpoint that answers at once and always the same, as a process of its own.

A request's header x-stand-in asks for otherwise: "slow", "refused" (429), "dropped" (no answer), or
"half" of a stream.

``python -m alignpro.bench.stand_in`` prints its port, and ends when its standard input does. It is
no server for other use: what it does not expect ends the connection.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from alignpro.serve.server import event_loop

EVENTS = 8
EVENT_SECONDS = 0.002  # between the events of a stream
SLOW_SECONDS = 0.3


def _chat(kind: str, **choice: Any) -> dict[str, Any]:
    about = {"id": "chatcmpl-0", "object": kind, "created": 0, "model": "stand-in"}
    return about | {"choices": [{"index": 0, "finish_reason": "stop", **choice}]}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_TEXT = "Bees read the sun, and landmarks. " * 8
_MESSAGE = {"role": "assistant", "content": _TEXT}
_BODY = json.dumps(_chat("chat.completion", message=_MESSAGE)).encode()
_WHOLE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_BODY)
) + _BODY
_REFUSED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_DELTA = json.dumps(_chat("chat.completion.chunk", delta={"content": _TEXT[:34]})).encode()
_EVENT = _chunk(b"data: " + _DELTA + b"\n\n")
_DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
            how = head.partition(b"\r\nx-stand-in:")[2].partition(b"\r\n")[0].strip()
            if how == b"dropped":
                return
            if how == b"slow":
                await asyncio.sleep(SLOW_SECONDS)
            if how == b"refused":
                writer.write(_REFUSED)
                continue
            if b'"stream": true' not in body:
                writer.write(_WHOLE)
                continue
            writer.write(_HEAD)
            for event in range(EVENTS):
                if how == b"half" and event == EVENTS // 2:
                    return
                writer.write(_EVENT)
                await asyncio.sleep(EVENT_SECONDS)
            writer.write(_DONE)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client left
    finally:
        writer.close()


async def _main() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    with event_loop() as loop:
        loop.run_until_complete(_main())
