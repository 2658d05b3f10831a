"""What a rewrite costs that breaks a guard: it would not be used in production."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alignpro.config import TrainConfig
from alignpro.guards import broken_by
from alignpro.types import Prompt, Response, Rewrite


def penalise(
    config: TrainConfig, prompts: Sequence[Prompt], rewrites: Sequence[Sequence[Rewrite]]
) -> tuple[list[list[Rewrite]], dict[str, Any]]:
    """The scored rewrites [prompts][N], those that break one of ``config.guards`` with its
    ``penalty`` less reward, and what a row of metrics says of it: nothing without guards.

    Rewrites that share their responses go on sharing them.
    """
    guards = config.guards
    if guards is None:
        return [list(group) for group in rewrites], {}
    broken: Counter[str] = Counter()
    lowered: dict[int, list[Response]] = {}  # by the list of responses

    def judged(prompt: Prompt, rewrite: Rewrite) -> Rewrite:
        guard = broken_by(rewrite, prompt, config.prompting, guards)
        if guard is None:
            return rewrite
        broken[guard] += 1
        given = rewrite.responses
        if id(given) not in lowered:
            lowered[id(given)] = [replace(r, reward=r.reward - guards.penalty) for r in given]
        return replace(rewrite, responses=lowered[id(given)])

    groups = [
        [judged(prompt, rewrite) for rewrite in group]
        for prompt, group in zip(prompts, rewrites, strict=True)
    ]
    return groups, {"broken_guards": dict(sorted(broken.items()))}
