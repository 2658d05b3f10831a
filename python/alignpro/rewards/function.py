"""Any plain Python function as a reward, with our signature or TRL's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.rewards.check import CONVERSATIONS, messages_of, reward_name
from alignpro.types import Texts

_OURS = ("prompts", "rewrites", "responses")
_EXPECTED = (
    "expected (prompts, rewrites, responses, **columns) or TRL's (prompts, completions, **columns)"
)


@dataclass(frozen=True)
class FunctionReward:
    """A function with what it accepts; made by ``from_callable``."""

    function: Callable[..., Sequence[float]]
    name: str
    arguments: tuple[str, ...]  # those of prompts, rewrites, responses, completions that it takes
    columns: frozenset[str]  # columns it names; "conversations" may be one of them
    required: frozenset[str]  # columns it cannot do without
    takes_all_columns: bool  # it has **kwargs

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> Sequence[float]:
        if CONVERSATIONS in self.columns and CONVERSATIONS not in columns:
            columns[CONVERSATIONS] = [messages_of(prompt) for prompt in prompts]
        missing = sorted(self.required - columns.keys())
        if "completion_ids" in missing:
            raise ValueError(
                f"reward function {self.name!r} takes completion_ids, which are not passed: a "
                "response may come from an endpoint, without tokens; read the text in completions"
            )
        if missing:
            raise ValueError(
                f"reward function {self.name!r} needs the data column {missing[0]!r}; "
                f"columns here: {sorted(columns) or 'none'}"
            )
        rows = {"prompts": prompts, "rewrites": rewrites, "responses": responses}
        rows["completions"] = responses
        clash = sorted(set(self.arguments) & columns.keys())
        if clash:
            raise ValueError(
                f"column {clash[0]!r} collides with a reward argument; rename the column"
            )
        wanted = {c: v for c, v in columns.items() if self.takes_all_columns or c in self.columns}
        try:
            return self.function(**{name: rows[name] for name in self.arguments}, **wanted)
        except TypeError as error:
            if not str(error).startswith("string indices must be integers"):
                raise
            raise TypeError(
                f"{error}: prompts and completions are plain text here, as TRL has them without "
                "messages; the messages of the prompts are in the argument conversations"
            ) from error


def from_callable(function: Callable[..., Any], name: str | None = None) -> FunctionReward:
    """Wraps a function that takes aligned lists by keyword and returns one number per row.

    Two signatures are known by their parameter names: ours, ``(prompts, rewrites, responses,
    **columns)``, and TRL's, ``(prompts, completions, **columns)``; ``completions`` are the
    responses as plain strings, and ``prompts`` the last user turns. Both may leave out what they do
    not use. Data columns are passed by name: all of them to a ``**kwargs``, otherwise those that
    the function names. ``conversations`` are the whole prompts, as lists of messages.

    Raises TypeError for an async function, for parameters that cannot be passed by name, and where
    neither ``responses`` nor ``completions`` is taken.
    """
    name = name or reward_name(function)
    # An object with an async __call__ is no coroutine function itself.
    if any(inspect.iscoroutinefunction(f) for f in (function, type(function).__call__)):
        raise TypeError(
            f"reward function {name!r} is async; rewards are plain functions: "
            "run the coroutine inside, with asyncio.run"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(f"reward {name!r} has no readable signature; {_EXPECTED}") from error

    kinds = inspect.Parameter
    wrong = [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY]
    named = {
        p.name: p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    texts = [what for what in ("responses", "completions") if what in named]
    if wrong or len(texts) != 1:
        shown = f"({', '.join(named) or 'no named parameter'})"
        problem = "takes both responses and completions" if texts else f"takes {shown}"
        problem = f": {wrong[0]!r} is positional-only" if wrong else f" {problem}"
        raise TypeError(f"reward function {name!r}{problem}; {_EXPECTED}")

    arguments = tuple(a for a in (*_OURS, "completions") if a in named)
    columns = {n: p for n, p in named.items() if n not in arguments}
    return FunctionReward(
        function=function,
        name=name,
        arguments=arguments,
        columns=frozenset(columns),
        required=frozenset(n for n, p in columns.items() if p.default is kinds.empty),
        takes_all_columns=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )
