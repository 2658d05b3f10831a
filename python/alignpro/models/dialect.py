"""The parameters that an endpoint takes: what one refuses is left out, or called as it asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What may be done without, and what changes its name. A stop text is cut off here as well.
_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_FIXED = {"model", "messages", "prompt"}
# What changes nothing at these values, and may be refused in any words: it is sent since servers
# have defaults of their own.
NEUTRAL = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# A refusal of the parameter itself; "max_tokens is too large" is none.
_REFUSED = re.compile(
    r"unsupported|not supported|n't support|not support|unknown|unrecogni[sz]ed|unexpected"
    r"|not (?:be )?(?:permitted|allowed|available|accepted)|extra (?:inputs|fields)|additional"
    r"|deprecated|instead|only .*(?:default|allowed|supported)|only be set to|compatible"
    r"|not accept|not an? (?:valid|known) (?:parameter|argument|field)"
    r"|cannot be (?:used|set|specified)|no such",
    re.IGNORECASE,
)


class Dialect:
    """``changes``: parameter -> what it is called here, or None where it is left out."""

    def __init__(self, changes: Mapping[str, str | None]) -> None:
        self.changes = dict(changes)

    def of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request as this endpoint takes it."""
        named = {self.changes.get(name, name): value for name, value in body.items()}
        return {name: value for name, value in named.items() if name is not None}

    def learn(self, sent: Mapping[str, Any], reply: object) -> str | None:
        """Change what a refusal names, and say so; None for a refusal of anything else."""
        error = reply.get("error", reply) if isinstance(reply, Mapping) else reply
        text = str(error)
        named = error.get("param") if isinstance(error, Mapping) else None
        candidates = [named] if isinstance(named, str) and named in sent else []
        candidates += [p for p in sent if re.search(rf"(?<![A-Za-z_]){re.escape(p)}\b", text)]
        neutral = {p for p in candidates if p in NEUTRAL and sent[p] == NEUTRAL[p]}
        refused = _REFUSED.search(text) is not None
        # What changes nothing goes first: of two that exclude each other, too.
        for parameter in sorted(candidates, key=lambda p: p not in neutral):
            if parameter in _FIXED or not (refused or parameter in neutral):
                continue
            original = next((k for k, v in self.changes.items() if v == parameter), parameter)
            other = _OTHER_NAME.get(parameter)
            self.changes[original] = other if other and original == parameter else None
            now = self.changes[original]
            return f"{parameter}; " + (f"{now} is sent instead" if now else "it is left out")
        return None
