"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_MILLISECONDS = (5, 10, 20, 30, 40, 50, 75, 100, 150, 250, 500, 1000)


class ServeMetrics:
    """Of one server; several may be in a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.chats = Counter(
            "alignpro_chat_requests",
            "Chat requests, by what came of their rewrite.",
            ("run", "mode", "applied", "reason"),
            registry=self._registry,
        )
        self.rewrite_seconds = Histogram(
            "alignpro_rewrite_seconds",
            "Seconds that a rewrite took, applied or not.",
            ("run",),
            buckets=[ms / 1e3 for ms in _MILLISECONDS],
            registry=self._registry,
        )
        self.answers = Counter(
            "alignpro_answers",
            "Answers to relayed requests, by status.",
            ("status",),
            registry=self._registry,
        )
        self.cut = Counter(
            "alignpro_answers_cut",
            "Answers that ended early, by who ended them.",
            ("by",),
            registry=self._registry,
        )
        self.under_way = Gauge(
            "alignpro_requests_in_progress", "Requests under way.", registry=self._registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
