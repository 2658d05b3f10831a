"""What a check is made of: the values of a record, the text it is from, and where in its lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alignpro.extract.kinds import Path
from alignpro.extract.source import Source

Value = TypeVar("Value")
BAD = object()  # in the place of a value that is none of its type, or that a check refused


class NotJudgedError(Exception):
    """A value is missing. blocked: it should be there, or is refused; else it may be absent."""

    def __init__(self, blocked: bool) -> None:
        super().__init__()
        self.blocked = blocked


class UncomputableError(Exception):
    """A number that there is not, such as one divided by 0."""


@dataclass
class Scope:
    """Values as `check.judge` reads them, at one element of each list."""

    values: Any
    source: Source | None
    at: dict[Path, int] = field(default_factory=dict)
    whole: dict[Any, Any] = field(default_factory=dict)  # by `once`; one for all elements


def look_up(scope: Scope, path: Path) -> Any:
    """The value of a path at the elements of ``scope``; None where there is none."""
    value = scope.values
    for number, name in enumerate(path):
        if value is None or value is BAD:
            return value
        value = value.get(name)
        here = path[: number + 1]
        if isinstance(value, list) and here in scope.at:
            value = value[scope.at[here]]
    return value


def elements(values: Any, source: Source | None, lists: tuple[Path, ...]) -> list[Scope]:
    """A scope for every element of the innermost list. A list that is refused blocks them all."""
    scopes = [Scope(values, source)]
    for path in lists:
        inner = []
        for scope in scopes:
            found = look_up(scope, path)
            if found is BAD:
                raise NotJudgedError(blocked=True)
            inner += [
                Scope(values, source, {**scope.at, path: number}, scope.whole)
                for number in range(len(found or ()))
            ]
        scopes = inner
    return scopes


def once(run: Callable[[Scope], Value]) -> Callable[[Scope], Value]:
    """``run`` reads lists whole: computed at the first element that asks, for all of them."""

    def known(scope: Scope) -> Value:
        if run not in scope.whole:
            try:
                scope.whole[run] = run(scope)
            except (NotJudgedError, UncomputableError) as error:
                scope.whole[run] = error
        found: Value | Exception = scope.whole[run]
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    return known
