"""Which run's prompter a request goes to, and whether its rewrite is used."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from alignpro.serve.rewriter import Rewriter
from alignpro.types import Conversation

Mode = Literal["on", "off", "shadow"]
_MODES: dict[bytes, Mode] = {b"on": "on", b"off": "off", b"shadow": "shadow"}


def mode_of(rewrite: bool | Literal["shadow"]) -> Mode:
    return "shadow" if rewrite == "shadow" else "on" if rewrite else "off"


def asked_mode(headers: Sequence[bytes]) -> Mode | None:
    """What a request's x-alignpro says, in one header or several, which a proxy may join by commas;
    None where that is no mode, or not one."""
    asked = {_MODES.get(one.strip().lower()) for one in b",".join(headers).split(b",")}
    return asked.pop() if len(asked) == 1 else None


@dataclass(frozen=True)
class Route:
    """Requests that are treated alike: at most two rewriters, the second with a share."""

    mode: Mode
    rewriters: Sequence[Rewriter] = ()
    share: float = 0.0

    def rewriter(self, conversation: Conversation) -> Rewriter:
        """A conversation stays with one of the two, whatever turns it gets."""
        if len(self.rewriters) == 1:
            return self.rewriters[0]
        first = conversation.messages[0]
        begin = f"{first['role']}: {first['content']}"
        drawn = zlib.crc32(begin.encode("utf-8", "surrogatepass")) / 2**32
        return self.rewriters[drawn < self.share]


@dataclass(frozen=True)
class Routes:
    """By the name of a request's model."""

    default: Route
    named: Mapping[str, Route] = field(default_factory=dict)

    def of(self, model: str) -> Route:
        return self.named.get(model, self.default)

    @property
    def is_off(self) -> bool:
        """Whether nothing is rewritten that does not ask for it."""
        return all(route.mode == "off" for route in (self.default, *self.named.values()))

    @property
    def rewriters(self) -> list[Rewriter]:
        """Each once."""
        routes = (self.default, *self.named.values())
        return list(dict.fromkeys(one for route in routes for one in route.rewriters))
