"""How the reports say things: names of the arms, verdicts in plain words, text made printable."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

ARMS = {
    "raw": "raw prompt",
    "static": "static instruction",
    "untuned": "untuned prompter",
    "trained": "trained prompter",
    "optimum": "resampled optimum",
    "tuned": "tuned target",
}
# Terminal control sequences hide in control characters; line breaks and tabs are harmless. The
# bidirectional controls reorder the text around them, ours included.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CHEAPER = "The instruction is also cheaper per request: no prompter runs before the target."


class Verdict(NamedTuple):
    tone: str  # "better", "worse", "unclear"
    text: str


def arm_title(key: str) -> str:
    """The arm in words; an arm unknown here goes by its key."""
    return ARMS.get(key, key)


def arms_of(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(key, title, arm) in the order of reading; arms unknown here come last, by their key."""
    arms: Mapping[str, Any] = report.get("arms") or {}
    return [(key, arm_title(key), arms[key]) for key in in_order(arms)]


def in_order(keys: Mapping[str, Any]) -> list[str]:
    """Keys of arms in the order of reading."""
    return [key for key in ARMS if key in keys] + [key for key in keys if key not in ARMS]


def paired_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{X: trained minus X} in the order of reading."""
    paired = {
        key.removeprefix("trained_minus_"): difference
        for key, difference in (report.get("paired") or {}).items()
    }
    return {key: paired[key] for key in in_order(paired)}


def component_names(report: Mapping[str, Any]) -> list[str]:
    """Names of reward components, where there is more than the reward itself to see."""
    names: dict[str, None] = {}
    for _, _, arm in arms_of(report):
        names.update(dict.fromkeys(arm.get("components") or {}))
    return list(names) if len(names) > 1 else []


def number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """``value`` with ``digits`` decimals; nothing where it is absent or not finite."""
    if not is_number(value):
        return ""
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def share(value: Any) -> str:
    """A share as per cent."""
    return f"{100 * value:.0f}%" if is_number(value) else ""


def interval(ci95: Any, digits: int = 3, *, sign: bool = False) -> str:
    """ "low to high" of an interval [low, high]; nothing where it is absent."""
    if not is_interval(ci95):
        return ""
    return " to ".join(number(bound, digits, sign=sign) for bound in ci95)


def share_interval(ci95: Any) -> str:
    """The same for an interval of shares."""
    return " to ".join(share(bound) for bound in ci95) if is_interval(ci95) else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    """Whether it is a pair of finite numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))


def tone(ci95: Any, null: float = 0.0) -> str:
    """Where the whole interval lies on one side of ``null``: "better", "worse", else "unclear"."""
    if not is_interval(ci95):
        return "unclear"
    return "better" if ci95[0] > null else "worse" if ci95[1] < null else "unclear"


def verdict(difference: Mapping[str, Any], against: str) -> Verdict:
    """One sentence on a paired difference {"mean", "ci95": [low, high]} of mean rewards.

    It claims a direction only where the whole interval lies on one side of zero.
    """
    numbers = (
        f"{number(difference['mean'], sign=True)} reward per prompt, "
        f"95% interval {interval(difference['ci95'], sign=True)}"
    )
    found = tone(difference["ci95"])
    if found == "better":
        return Verdict(found, f"The trained prompter beats the {against}: {numbers}.")
    if found == "worse":
        return Verdict(found, f"The trained prompter does worse than the {against}: {numbers}.")
    return Verdict(
        found, f"No clear difference between the trained prompter and the {against}: {numbers}."
    )


def verdicts(report: Mapping[str, Any]) -> list[tuple[str, Verdict]]:
    """(arm, sentence) for every paired difference of the report."""
    return [
        (key, verdict(difference, arm_title(key))) for key, difference in paired_of(report).items()
    ]


def headline(report: Mapping[str, Any]) -> Verdict:
    """The answer to "does the trained prompter help?", with the static instruction's claim first.

    A static instruction that wins is named as the winner, and one that keeps level is advised: it
    needs no prompter at all.
    """
    arms, paired = report.get("arms") or {}, paired_of(report)
    if not arms:
        return Verdict("unclear", "Not known yet: no held-out evaluation is part of this report.")
    if "trained" not in arms:
        return Verdict("unclear", "Not known yet: the evaluation has no trained prompter.")
    against_raw = tone(paired["raw"]["ci95"]) if "raw" in paired else "unclear"
    if against_raw == "worse" and not _leads(arms, "static", "raw"):
        return Verdict("worse", "No: the raw prompt does better without the trained prompter.")
    if "static" in paired:
        difference = paired["static"]
        found = tone(difference["ci95"])
        by = f"by {number(abs(difference['mean']))} reward per prompt"
        if found == "worse":
            advice = "Use the instruction."
            if _leads(arms, "raw", "static"):
                advice = "The raw prompt, with a higher mean still, needs neither."
            return Verdict(
                found,
                f"The static instruction wins: it beats the trained prompter {by}. {_CHEAPER} "
                f"{advice}",
            )
        if found == "unclear":
            ahead = "static instruction" if difference["mean"] < 0 else "trained prompter"
            return Verdict(
                found,
                "The trained prompter is not clearly better than a static instruction (the "
                f"{ahead} is ahead {by}, within the noise). {_CHEAPER} Prefer it until a larger "
                "evaluation tells the two apart.",
            )
    helps = {
        key: tone(paired[key]["ci95"]) for key in ("raw", "untuned", "static") if key in paired
    }
    beaten = [f"the {arm_title(key)}" for key, found in helps.items() if found == "better"]
    level = [f"the {arm_title(key)}" for key, found in helps.items() if found == "unclear"]
    lost = [f"the {arm_title(key)}" for key, found in helps.items() if found == "worse"]
    parts = [f"it beats {_listed(beaten)}"] if beaten else []
    parts += [f"it is not clearly better than {_listed(level, 'or')}"] if level else []
    parts += [f"it does worse than {_listed(lost)}"] if lost else []
    text = "; ".join(parts)
    if not parts:
        return Verdict("unclear", "Not known: the trained prompter was compared with no other way.")
    if not (level or lost):
        return Verdict("better", f"Yes: {text}.")
    return Verdict(
        "unclear", f"In part: {text}." if helps.get("raw") == "better" else f"Not shown: {text}."
    )


def judge_verdict(name: str, comparison: Mapping[str, Any]) -> Verdict:
    """One sentence on a win rate of the judge; ``name`` is "trained_vs_raw"."""
    left, right = comparison_titles(name)
    found = tone(comparison.get("ci95"), null=0.5)
    says = {
        "better": f"The judge prefers the {left} over the {right}",
        "worse": f"The judge prefers the {right} over the {left}",
        "unclear": f"The judge does not tell the {left} from the {right}",
    }[found]
    text = f"{says}: win rate {share(comparison.get('win_rate'))}"
    if is_interval(comparison.get("ci95")):
        text += f" ({share_interval(comparison['ci95'])})"
    if is_number(comparison.get("length_controlled_win_rate")):
        text += f", {share(comparison['length_controlled_win_rate'])} at equal length"
    return Verdict(found, text + ".")


def comparison_titles(name: str) -> tuple[str, str]:
    """ "trained_vs_raw" -> ("trained prompter", "raw prompt")."""
    left, _, right = name.partition("_vs_")
    return arm_title(left), arm_title(right)


def gap_closed_sentence(gap: Mapping[str, Any]) -> str:
    """The share of the oracle's gain that the trained prompter reaches, or why there is none."""
    if not is_number(gap.get("share")):
        reason = gap.get("reason") or "the gap was not measured"
        return f"No share of the oracle's gap: {reason}."
    bounds = (
        f" (95% interval {share_interval(gap['ci95'])})" if is_interval(gap.get("ci95")) else ""
    )
    return (
        f"The trained prompter closes {share(gap['share'])}{bounds} of the gap between the "
        "untuned prompter and the tuned target."
    )


def recommended_point(headroom: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of the frontier at ``recommended_kl_coef``, or None."""
    wanted = headroom.get("recommended_kl_coef")
    points = [p for p in headroom.get("frontier") or [] if is_number(p.get("kl_coef"))]
    if not is_number(wanted) or not points:
        return None
    nearest: Mapping[str, Any] = min(points, key=lambda p: abs(float(p["kl_coef"]) - wanted))
    return nearest if math.isclose(nearest["kl_coef"], wanted, rel_tol=1e-6) else None


def _leads(arms: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether both arms were measured and the first has the higher mean."""
    first, second = ((arms.get(key) or {}).get("mean_reward") for key in (one, other))
    return is_number(first) and is_number(second) and first > second


def _listed(names: list[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def printable(text: object) -> str:
    """``text`` with control characters and lone surrogates shown as a replacement character."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))
    return shown.encode("utf-8", "replace").decode("utf-8")


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
