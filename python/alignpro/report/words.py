"""How the reports say things: names of the arms, a verdict in plain words, text made printable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ARMS = {"raw": "raw prompt", "untuned": "untuned prompter", "trained": "trained prompter"}
COMPARISONS = {
    "trained_minus_raw": "the raw prompt",
    "trained_minus_untuned": "the untuned prompter",
}
# Terminal control sequences hide in control characters; line breaks and tabs are harmless.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def arms_of(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(key, title, arm) in the order of reading; arms unknown here come last, by their key."""
    arms: Mapping[str, Any] = report["arms"]
    keys = [key for key in ARMS if key in arms] + [key for key in arms if key not in ARMS]
    return [(key, ARMS.get(key, key), arms[key]) for key in keys]


def component_names(report: Mapping[str, Any]) -> list[str]:
    """Names of reward components, where there is more than the reward itself to see."""
    names: dict[str, None] = {}
    for _, _, arm in arms_of(report):
        names.update(dict.fromkeys(arm.get("components") or {}))
    return list(names) if len(names) > 1 else []


def verdict(difference: Mapping[str, Any], against: str) -> str:
    """One sentence on a paired difference {"mean", "ci95": [low, high]} of mean rewards.

    It claims a direction only where the whole interval lies on one side of zero.
    """
    mean = float(difference["mean"])
    low, high = (float(bound) for bound in difference["ci95"])
    numbers = f"{mean:+.3f} reward per prompt, 95% interval {low:+.3f} to {high:+.3f}"
    if low > 0:
        return f"The trained prompter beats {against}: {numbers}."
    if high < 0:
        return f"The trained prompter does worse than {against}: {numbers}."
    return f"No clear difference between the trained prompter and {against}: {numbers}."


def verdicts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, sentence) for every paired difference of the report."""
    return [
        (key, verdict(difference, COMPARISONS.get(key, key.removeprefix("trained_minus_"))))
        for key, difference in report.get("paired", {}).items()
    ]


def printable(text: object) -> str:
    """``text`` with control characters and lone surrogates shown as a replacement character."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))
    return shown.encode("utf-8", "replace").decode("utf-8")


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
