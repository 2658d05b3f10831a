"""How a model behind an HTTP endpoint is asked, and what that may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from alignpro.config.fields import Place, above, at_least, checked, require


@dataclass(frozen=True)
@checked
class Budget:
    """What an endpoint may be asked for; the next call over it stops the run, which can be resumed.

    Everything that the file of recorded calls holds counts, also what an earlier process asked.
    """

    calls: Annotated[int, at_least(1)] | None = None
    """The most requests that are sent, repeated ones included; null sets no limit."""
    tokens: Annotated[int, at_least(1)] | None = None
    """The most tokens that are read and written; null sets no limit."""
    cost: Annotated[float, above(0)] | None = None
    """The most that calls may cost, in the currency of the prices; null sets no limit."""


@dataclass(frozen=True)
@checked
class ClientConfig:
    """How an endpoint is asked: how much at once, for how long, how often, at what price."""

    concurrency: Annotated[int, at_least(1)] = 16
    """How many calls are under way at once."""
    requests_per_minute: Annotated[float, above(0)] | None = None
    """The most requests in a minute; null sets no limit of ours."""
    connect_seconds: Annotated[float, above(0)] = 10.0
    """Seconds until a connection has to stand."""
    first_byte_seconds: Annotated[float, above(0)] | None = None
    """Seconds until an answer has to begin; null is timeout_seconds.

    An endpoint may begin only when it has all of the answer.
    """
    timeout_seconds: Annotated[float, above(0)] = 120.0
    """Seconds for the whole of one attempt."""
    max_retries: Annotated[int, at_least(0)] = 6
    """How often a failed call is repeated.

    After 429, 5xx, a timeout, a broken connection or a reply that is none; the pauses double from
    half a second on, and are never shorter than Retry-After says.
    """
    input_price: Annotated[float, at_least(0)] | None = None
    """The price of a million tokens read; null leaves costs out."""
    output_price: Annotated[float, at_least(0)] | None = None
    """The price of a million tokens written; null leaves costs out."""
    budget: Budget = field(default_factory=Budget)
    """What the endpoint may be asked for before the run stops."""
    calls: Place | None = None
    """The JSONL file of every call and its answer, from which a call is not asked again; null is
    calls.jsonl in the run directory, or a file beside the output."""
    logprobs: bool = False
    """Whether answers come with their tokens' log-probabilities, where the endpoint tells them.

    They are those of temperature 1, whatever is sampled at (vLLM's and llama.cpp's as they are
    started by default). The bound asks for them by itself.
    """
    body: dict[str, Any] | None = None
    """More fields of every request, as the endpoint names them, such as {reasoning_effort: low}; a
    null leaves one of ours out."""

    def __post_init__(self) -> None:
        check_priced(self.budget, self.input_price, self.output_price)
        ours = {"model", "messages", "n", "stream"} & set(self.body or {})
        require("body", self.body, not ours, f"no {', '.join(sorted(ours))}: alignpro sets it")


def check_priced(budget: Budget, *prices: float | None) -> None:
    """Refuse a budget of money where a price is missing."""
    priced = budget.cost is None or None not in prices
    require("budget.cost", budget.cost, priced, "null without both prices")


def check_url(name: str, url: str) -> None:
    """Refuse what is no address of an endpoint, and one with a password, which would be stored."""
    require(name, url, url.startswith(("http://", "https://")), "an http:// or https:// address")
    if "@" in url or "?" in url:
        raise ValueError(
            f"{name}: expected an address without user, password and query; "
            "a key goes into an environment variable, which api_key_env names"
        )
