"""What `alignpro serve` listens on, asks, rewrites, and how much of each it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from alignpro.config.endpoint import check_url
from alignpro.config.fields import Bytes, Place, Range, Threads, above, at_least, checked, require
from alignpro.config.guards import GuardConfig

Port = Annotated[int, Range(lambda v: 0 <= v < 2**16, "between 0 and 65535")]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
@checked
class AuditConfig:
    """Where it is written down what became of chat requests; a text alone is the file."""

    text_field: ClassVar[str] = "path"

    path: Place | None = None
    """The file of JSON lines, one a chat request, never with its headers; null writes nothing."""
    texts: bool = False
    """Whether last turns and rewrites are in it as well."""
    max_bytes: Bytes = 2**26
    """The bytes at which the file is put aside (.1, .2, ...) and a new one begun."""
    files: Annotated[int, at_least(1)] = 5
    """How many files are kept that were put aside."""


@dataclass(frozen=True)
@checked
class RouteConfig:
    """How requests for one model are rewritten; a text alone is the run."""

    text_field: ClassVar[str] = "run"

    run: Place | None = None
    """The run whose prompter rewrites; null rewrites nothing."""
    sampling: dict[str, Any] | None = None
    """Fields of the run's ``rewrite`` in which rewrites are drawn otherwise than in training, such
    as {temperature: 0}; null is none."""
    rewrite: bool | Literal["shadow"] = True
    """As of all requests, for this model's."""
    second_run: Place | None = None
    """A run that takes a share of the conversations, to be compared; null is none."""
    share: Annotated[float, Range(lambda v: 0 <= v <= 1, "between 0 and 1")] = 0.0
    """The share of conversations of the second run; a conversation stays with one of the two."""

    def __post_init__(self) -> None:
        sampled = self.sampling is None or self.run is not None
        require("sampling", self.sampling, sampled, "null without run")
        rewrites = self.rewrite is False or self.run is not None
        require("rewrite", self.rewrite, rewrites, "false without run")
        shared = self.share == 0 or self.second_run is not None
        require("share", self.share, shared, "0 without second_run")
        first = self.second_run is None or self.run is not None
        require("second_run", self.second_run, first, "null without run")


@dataclass(frozen=True)
@checked
class ServeConfig(RouteConfig):
    """A proxy in front of an upstream, or of a model in this process, with a prompter in it."""

    upstream: str | None = None
    """The OpenAI-compatible endpoint that answers, as its clients' base_url, such as
    "https://.../v1"; null is a model in this process."""
    model: Place | None = None
    """The model in this process that answers: a path or a name; null is for an upstream."""
    rewrite: bool | Literal["shadow"] = False
    """Whether requests that do not say it (x-alignpro: on, off, shadow) are rewritten.

    shadow: they are rewritten beside the answer to the original, and the rewrite is only counted.
    """
    routes: dict[str, RouteConfig] | None = None
    """By the name of a request's model, what is to be otherwise there: {name: {run, sampling,
    rewrite, second_run, share}}."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    """Where it is written down what became of chat requests."""
    deadline_seconds: Annotated[float, above(0)] = 0.15
    """Seconds for a rewrite, after which the original goes out."""
    max_queue: Annotated[int, at_least(1)] = 64
    """The most rewrites under way; the original of one more goes out."""
    circuit_failures: Annotated[int, at_least(1)] = 10
    """Failures of rewrites in a row (errors, deadlines) after which none is tried for a while."""
    circuit_seconds: Annotated[float, above(0)] = 10.0
    """Seconds after which one is tried again."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """What a rewrite must keep to be used."""
    host: str = "127.0.0.1"
    """The address to listen on; any but the loopback's is reachable from elsewhere."""
    port: Port = 8000
    """The port to listen on; 0 is a free one."""
    max_body: Bytes = 2**25
    """The most bytes of a chat request, which is held in memory; other requests are relayed as they
    come."""
    max_header: Bytes = 2**16
    """The most bytes of a request's headers."""
    max_connections: Annotated[int, at_least(1)] = 1024
    """The most connections at once; requests on one more are answered with status 503."""
    receive_seconds: Annotated[float, above(0)] = 30.0
    """Seconds in which the headers, and then a chat request's body, have to arrive; of other bodies
    the next bytes."""
    send_seconds: Annotated[float, above(0)] = 60.0
    """Seconds for which a client may take nothing of its answer before its connection is ended."""
    connect_seconds: Annotated[float, above(0)] = 10.0
    """Seconds until a connection to the upstream has to stand."""
    idle_seconds: Annotated[float, above(0)] = 600.0
    """Seconds for which the upstream may send nothing of an answer that is due."""
    shutdown_seconds: Annotated[float, above(0)] = 30.0
    """Seconds in which requests under way may end after SIGTERM or SIGINT."""
    threads: Threads = None
    """The number of threads of the models; null is the CPU quota."""

    def __post_init__(self) -> None:
        if self.upstream is not None:
            check_url("upstream", self.upstream)
        expected = "null with upstream: one of the two answers"
        require("model", self.model, self.model is None or self.upstream is None, expected)
        RouteConfig.__post_init__(self)
