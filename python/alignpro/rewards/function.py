"""Any plain Python function as a reward, with our signature or TRL's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.rewards.check import (
    COMPLETION_IDS,
    CONVERSATIONS,
    RESPONSE_LOGPROBS,
    check_names,
    messages_of,
    no_column,
    resolved,
    reward_name,
)
from alignpro.types import Texts

_OURS = ("prompts", "rewrites", "responses")
_EXPECTED = (
    "expected (prompts, rewrites, responses, **columns) or TRL's (prompts, completions, **columns)"
)
# What TRL's trainer gives to a reward function that is its own alone.
_OF_TRAINER = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass(frozen=True)
class FunctionReward:
    """A function with what it accepts; made by ``from_callable``."""

    function: Callable[..., Any]
    name: str
    arguments: tuple[str, ...]  # those of prompts, rewrites, responses, completions that it takes
    columns: frozenset[str]  # columns it names; "conversations" may be one of them
    required: frozenset[str]  # columns it cannot do without
    takes_all_columns: bool  # it has **kwargs
    costs_money: bool = False  # see `score_checked`

    @property
    def takes_completion_ids(self) -> bool:
        return COMPLETION_IDS in self.columns or (self._is_trl and self.takes_all_columns)

    @property
    def takes_response_logprobs(self) -> bool:
        return RESPONSE_LOGPROBS in self.columns

    @property
    def _is_trl(self) -> bool:
        return "completions" in self.arguments

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        chats = columns.get(CONVERSATIONS)  # where the data set's prompts are messages
        if CONVERSATIONS in self.columns:
            columns.setdefault(CONVERSATIONS, [messages_of(prompt) for prompt in prompts])
        self.check_columns(columns)
        rows = {"prompts": prompts, "rewrites": rewrites, "responses": responses}
        wanted = {c: v for c, v in columns.items() if self.takes_all_columns or c in self.columns}

        def called(chats: Sequence[Any] | None) -> Any:
            """chats: the prompts as messages, where completions are to be messages as well."""
            own: dict[str, Sequence[Any]] = {**rows, "completions": responses}
            if chats is not None:
                own["prompts"] = chats
                own["completions"] = [[{"role": "assistant", "content": y}] for y in responses]
            given = {name: own[name] for name in self.arguments}
            return resolved(self.function(**given, **wanted))

        if not self._is_trl:
            return called(None)  # type: ignore[no-any-return]
        try:
            return called(chats)  # type: ignore[no-any-return]
        except (TypeError, AttributeError) as error:
            if chats is not None or not str(error).startswith(_WANTS_MESSAGES):
                raise
            try:
                return called([messages_of(p) for p in prompts])  # type: ignore[no-any-return]
            except Exception:
                raise error from None  # of what it was given

    def check_columns(self, names: Collection[str]) -> None:
        """Raises ValueError where a column that the function cannot do without is not in ``names``
        (the data's, with what is given beside them), or one is called as an argument of it."""
        check_names(names, self.arguments)
        missing = sorted(self.required - set(names))
        if COMPLETION_IDS in missing:
            raise ValueError(
                f"reward function {self.name!r} takes {COMPLETION_IDS}, which are not there: the "
                "target is behind an endpoint, without tokens; read the text in completions"
            )
        if RESPONSE_LOGPROBS in missing:
            raise ValueError(
                f"reward function {self.name!r} takes {RESPONSE_LOGPROBS}, which are not there: "
                "the target is behind an endpoint that tells none; target.client.logprobs=true "
                "asks for them"
            )
        if missing:
            raise ValueError(f"reward function {self.name!r} {no_column(missing[0], names)}")


# What Python says to c[0]["content"] and c[0].get("content") where c is text.
_WANTS_MESSAGES = ("string indices must be integers", "'str' object has no attribute")


def from_callable(function: Callable[..., Any], name: str | None = None) -> FunctionReward:
    """Wraps a function that takes aligned lists by keyword and returns one number per row.

    Two signatures are known by their parameter names: ours, ``(prompts, rewrites, responses,
    **columns)``, and TRL's, ``(prompts, completions, **columns)``. Ours is given text: responses,
    and the last user turns. TRL's is given what TRL gives: messages where the data set's prompts
    are messages, or where the function asks text for them, else text; and ``completion_ids``, the
    tokens of the responses. Both may leave out what they do not use. Data columns are passed by
    name: all of them to a ``**kwargs``, otherwise those that the function names. ``conversations``
    are the whole prompts, as lists of messages. The function may be async; None for a row is no
    score.

    Raises TypeError for parameters that cannot be passed by name, for those that TRL's trainer
    alone gives, and where neither ``responses`` nor ``completions`` is taken.
    """
    name = name or reward_name(function)
    # An object with an async __call__ is no coroutine function itself.
    later = any(inspect.iscoroutinefunction(f) for f in (function, type(function).__call__))
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

    own = next((p for p in _OF_TRAINER if p in named and named[p].default is kinds.empty), None)
    if own is not None:
        raise TypeError(
            f"reward function {name!r} takes {own}, which TRL's trainer alone has; give it a "
            f"default, such as {own}=None"
        )

    arguments = tuple(a for a in (*_OURS, "completions") if a in named)
    columns = {n: p for n, p in named.items() if n not in arguments}
    return FunctionReward(
        function=function,
        name=name,
        arguments=arguments,
        columns=frozenset(columns),
        required=frozenset(n for n, p in columns.items() if p.default is kinds.empty),
        takes_all_columns=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
        costs_money=later or bool(getattr(function, "costs_money", False)),
    )
