"""How a model behind an HTTP endpoint is asked, and what that may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from alignpro.config.fields import above, at_least, checked, require


@dataclass(frozen=True)
@checked
class Budget:
    """What an endpoint may be asked for; the next call over it stops the run, which can be resumed.

    Everything that the file of recorded calls holds counts, also what an earlier process asked.
    """

    calls: Annotated[int, at_least(1)] | None = None  # requests sent, repeated ones included
    tokens: Annotated[int, at_least(1)] | None = None  # read and written
    cost: Annotated[float, above(0)] | None = None  # in the currency of the prices


@dataclass(frozen=True)
@checked
class ClientConfig:
    """How an endpoint is asked: how much at once, for how long, how often, at what price."""

    concurrency: Annotated[int, at_least(1)] = 16  # calls under way at once
    requests_per_minute: Annotated[float, above(0)] | None = None  # None: no limit of our own
    connect_seconds: Annotated[float, above(0)] = 10.0
    # Until an answer begins. None: timeout_seconds; an endpoint may begin when it has all of it.
    first_byte_seconds: Annotated[float, above(0)] | None = None
    timeout_seconds: Annotated[float, above(0)] = 120.0  # for the whole of one attempt
    # After 429, 5xx, a timeout, a broken connection or a reply that is none; the pauses double
    # from half a second on, and are never shorter than Retry-After says.
    max_retries: Annotated[int, at_least(0)] = 6
    input_price: Annotated[float, at_least(0)] | None = None  # of a million tokens read
    output_price: Annotated[float, at_least(0)] | None = None  # of a million tokens written
    budget: Budget = field(default_factory=Budget)
    # The JSONL file of every call and its answer: what is in it is not asked for again. None:
    # calls.jsonl in the run directory, or beside the output file.
    calls: str | None = None
    # More fields of every request, as the endpoint names them: {"reasoning_effort": "low"}.
    # null leaves one of ours out.
    body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        priced = self.input_price is not None and self.output_price is not None
        unpriced = self.budget.cost is not None and not priced
        require("budget.cost", self.budget.cost, not unpriced, "null without both prices")
        ours = {"model", "messages", "n", "stream"} & set(self.body or {})
        require("body", self.body, not ours, f"no {', '.join(sorted(ours))}: alignpro sets it")


def check_url(name: str, url: str) -> None:
    """Refuse what is no address of an endpoint, and one with a password, which would be stored."""
    require(name, url, url.startswith(("http://", "https://")), "an http:// or https:// address")
    if "@" in url or "?" in url:
        raise ValueError(
            f"{name}: expected an address without user, password and query; "
            "a key goes into an environment variable, which api_key_env names"
        )
