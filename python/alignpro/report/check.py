"""Whether plain data is a report: looked at before tables and plots start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignpro.report.words import is_interval, is_number


def check_report(report: Mapping[str, Any], where: str = "report") -> None:
    """Every part may be absent; a part that is there has the shape of the report's contract.

    Raises:
        ValueError: the first part that has not: where it is, what was expected and what came.
    """
    for key, arm in _mapping(report, "arms", where).items():
        here = f"{where}: arms.{key}"
        _is(arm, Mapping, here, "an object")
        _number(arm, "mean_reward", here)
        _interval(arm, "ci95", here)
        _mapping(arm, "components", here)
    for key, difference in _mapping(report, "paired", where).items():
        here = f"{where}: paired.{key}"
        _is(difference, Mapping, here, "an object")
        _number(difference, "mean", here)
        _interval(difference, "ci95", here)
    _mapping(report, "gap_closed", where)
    for name, row in _mapping(_mapping(report, "judge", where), "comparisons", where).items():
        _is(row, Mapping, f"{where}: judge.comparisons.{name}", "an object")
    headroom = _mapping(report, "headroom", where)
    for name, number in (("frontier", "kl_coef"), ("best_of_n", "n")):
        for index, point in enumerate(_list(headroom, name, f"{where}: headroom")):
            here = f"{where}: headroom.{name}[{index}]"
            _is(point, Mapping, here, "an object")
            _number(point, number, here)
    _mapping(headroom, "variance", f"{where}: headroom")
    bound = _mapping(report, "bound", where)
    for name, term in _mapping(bound, "terms", f"{where}: bound").items():
        _is(term, Mapping, f"{where}: bound.terms.{name}", "an object with mean and ci95")
    for name in ("bound", "measured_gap", "slack", "trained_gap"):
        _mapping(bound, name, f"{where}: bound")
    for name, value in _mapping(bound, "rewards", f"{where}: bound").items():
        _is(value, Mapping, f"{where}: bound.rewards.{name}", "an object with mean and ci95")
    closed = _mapping(bound, "closed_form", f"{where}: bound")
    for name in ("kl_coef", "effective_samples") if closed else ():
        _number(closed, name, f"{where}: bound.closed_form")
    for index, sample in enumerate(_list(report, "samples", where)):
        here = f"{where}: samples[{index}]"
        _is(sample, Mapping, here, "an object")
        _is(sample.get("prompt"), str, f"{here}.prompt", "text")
    for name in ("config", "versions", "seconds"):
        _mapping(report, name, where)


def _mapping(holder: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = holder.get(name)
    if value is None:
        return {}
    _is(value, Mapping, f"{where}: {name}", "an object")
    found: Mapping[str, Any] = value
    return found


def _list(holder: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = holder.get(name)
    if value is None:
        return []
    _is(value, (list, tuple), f"{where}: {name}", "a list")
    return list(value)


def _is(value: Any, kind: Any, where: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {expected}, got {_short(value)}")


def _number(holder: Mapping[str, Any], name: str, where: str) -> None:
    if not is_number(holder.get(name)):
        raise ValueError(f"{where}.{name}: expected a number, got {_short(holder.get(name))}")


def _interval(holder: Mapping[str, Any], name: str, where: str) -> None:
    if not is_interval(holder.get(name)):
        raise ValueError(f"{where}.{name}: expected [low, high], got {_short(holder.get(name))}")


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
