"""An upstream that says what it is told, and a proxy in front of it."""

from __future__ import annotations

import pytest

from alignpro.config.serve import ServeConfig
from serve.raw_upstream import (
    RawUpstream,
    answer,
)
from serve.running import running


@pytest.fixture
def echo():
    """Answers what it is told in ``echo.says``."""

    def reply(got, send):
        send(upstream.says)

    upstream = RawUpstream(reply)
    upstream.says = answer(b'{"ok": true}', headers=b"content-type: application/json\r\n")
    with upstream:
        yield upstream


@pytest.fixture
def proxy(echo):
    with running(ServeConfig(upstream=echo.url, port=0)) as made:
        yield made
