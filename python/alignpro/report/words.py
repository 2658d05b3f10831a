"""How the reports say things: names of the arms, verdicts in plain words, text made printable."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

from alignpro.config import ARMS
from alignpro.evaluate.results import (
    ArmResult,
    Comparison,
    Evaluation,
    GapClosed,
    Interval,
    JudgeResult,
    Pair,
    Required,
    SearchResult,
)

# Terminal control sequences hide in control characters; line breaks and tabs are harmless. The
# bidirectional controls reorder the text around them, ours included.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_RIVALS = ("raw", "untuned", "static", "policy_text")  # what could be had without training
_CHEAPER = "The instruction is also cheaper per request: no prompter runs before the target."


Tone = Literal["better", "worse", "unclear"]
Value = TypeVar("Value")


class Verdict(NamedTuple):
    tone: Tone
    text: str


def arm_title(key: str) -> str:
    """The arm in words; an arm unknown here goes by its key."""
    return ARMS.get(key, key)


def in_order(arms: Mapping[str, Value]) -> dict[str, Value]:
    """What is there by arm, in the order of reading; arms unknown here come last."""
    return {key: arms[key] for key in [*ARMS, *arms] if key in arms}


def paired_of(evaluation: Evaluation) -> dict[str, Interval]:
    """{X: trained minus X} in the order of reading."""
    return in_order({key.removeprefix("trained_minus_"): d for key, d in evaluation.paired.items()})


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """``value`` with ``digits`` decimals; nothing where it is absent."""
    if value is None:
        return ""
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def interval(ci95: Pair | None, digits: int = 3, *, sign: bool = False) -> str:
    """ "low to high" of an interval; nothing where it is absent."""
    return " to ".join(number(bound, digits, sign=sign) for bound in ci95 or ())


def share_interval(ci95: Pair | None) -> str:
    return " to ".join(share(bound) for bound in ci95 or ())


def relative_change(change: Interval) -> str:
    """ "-20% (-30% to +5%)"."""
    return f"{change.mean:+.0%} ({' to '.join(f'{bound:+.0%}' for bound in change.ci95)})"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tone(ci95: Pair | None, null: float = 0.0) -> Tone:
    """Where the whole interval lies on one side of ``null``: "better", "worse", else "unclear"."""
    low, high = ci95 or (null, null)
    return "better" if low > null else "worse" if high < null else "unclear"


def verdict(difference: Interval, against: str) -> Verdict:
    """One sentence on a paired difference of mean rewards.

    It claims a direction only where the whole interval lies on one side of zero.
    """
    numbers = (
        f"{number(difference.mean, sign=True)} reward per prompt, "
        f"95% interval {interval(difference.ci95, sign=True)}"
    )
    found = tone(difference.ci95)
    says = {
        "better": f"The trained prompter beats the {against}",
        "worse": f"The trained prompter does worse than the {against}",
        "unclear": f"No clear difference between the trained prompter and the {against}",
    }[found]
    return Verdict(found, f"{says}: {numbers}.")


def verdicts(evaluation: Evaluation) -> list[Verdict]:
    return [verdict(d, arm_title(key)) for key, d in paired_of(evaluation).items()]


def required_verdicts(evaluation: Evaluation | None) -> list[Verdict]:
    """One sentence on each difference that was required."""
    required = None if evaluation is None else evaluation.required
    return [_required_verdict(one) for one in required or ()]


def _required_verdict(required: Required) -> Verdict:
    arms = f"{arm_title(required.left)} minus {arm_title(required.right)}"
    numbers = (
        f"{number(required.difference.mean, sign=True)} reward per prompt, 95% interval "
        f"{interval(required.difference.ci95, sign=True)}"
    )
    line = f"above {number(required.margin, sign=True)}" if required.margin else "above 0"
    says = f"met, {arms} is {line}" if required.met else f"not met, {arms} is not {line}"
    found: Tone = "better" if required.met else "worse"
    return Verdict(found, f"Required: {required.requirement}: {says}: {numbers}.")


def judge_verdicts(judge: JudgeResult) -> list[Verdict]:
    return [judge_verdict(name, row) for name, row in judge.comparisons.items()]


def headline(evaluation: Evaluation | None) -> Verdict:
    """The answer to "does the trained prompter help?", with the static instruction's claim first.

    A static instruction that wins is named as the winner, and one that keeps level is advised: it
    needs no prompter at all.
    """
    if evaluation is None:
        return Verdict("unclear", "Not known yet: no held-out evaluation is part of this report.")
    arms, paired = evaluation.arms, paired_of(evaluation)
    if "trained" not in arms:
        return Verdict("unclear", "Not known yet: the evaluation has no trained prompter.")
    against_raw = tone(paired["raw"].ci95) if "raw" in paired else "unclear"
    if against_raw == "worse" and not _leads(arms, "static", "raw"):
        return Verdict("worse", "No: the raw prompt does better without the trained prompter.")
    if "static" in paired:
        difference = paired["static"]
        found = tone(difference.ci95)
        by = f"by {number(abs(difference.mean))} reward per prompt"
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
            ahead = "static instruction" if difference.mean < 0 else "trained prompter"
            return Verdict(
                found,
                "The trained prompter is not clearly better than a static instruction (the "
                f"{ahead} is ahead {by}, within the noise). {_CHEAPER} Prefer it until a larger "
                "evaluation tells the two apart.",
            )
    helps = {key: tone(paired[key].ci95) for key in _RIVALS if key in paired}
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


def judge_verdict(name: str, comparison: Comparison) -> Verdict:
    """One sentence on a win rate of the judge; ``name`` is "trained_vs_raw"."""
    left, right = comparison_titles(name)
    found = tone(comparison.ci95, null=0.5)
    says = {
        "better": f"The judge prefers the {left} over the {right}",
        "worse": f"The judge prefers the {right} over the {left}",
        "unclear": f"The judge does not tell the {left} from the {right}",
    }[found]
    text = f"{says}: win rate {share(comparison.win_rate)}"
    if comparison.ci95 is not None:
        text += f" ({share_interval(comparison.ci95)})"
    if comparison.length_controlled_win_rate is not None:
        text += f", {share(comparison.length_controlled_win_rate)} at equal length"
    return Verdict(found, text + ".")


def comparison_titles(name: str) -> tuple[str, str]:
    """ "trained_vs_raw" -> ("trained prompter", "raw prompt")."""
    left, _, right = name.partition("_vs_")
    return arm_title(left), arm_title(right)


def gap_sentences(evaluation: Evaluation) -> list[str]:
    """How far the trained prompter comes between two other arms, or why that has no number; how
    its variance changes; and how far a soft prompt comes."""
    ways = (
        (evaluation.gap_closed, "untuned", "tuned"),
        (evaluation.static_to_labelled, "static", "labelled"),
    )
    said = [_gap_sentence(gap, *ends) for gap, *ends in ways if gap is not None]
    if (change := evaluation.variance_change) is not None:
        said.append(
            f"The variance of its reward against the untuned prompter's: {relative_change(change)}."
        )
    soft = evaluation.soft_differences
    return said if soft is None else [*said, _soft_sentence(soft)]


def _soft_sentence(differences: Mapping[str, Interval]) -> str:
    """What trained rows behind, or before, every prompt are worth, in the target as it is."""
    parts = [
        f"{number(difference.mean, sign=True)} ({interval(difference.ci95, sign=True)}) against "
        f"the {arm_title(key)}"
        for key in ("raw", "static", "tuned")
        if (difference := differences.get(f"soft_minus_{key}")) is not None
    ]
    says = f"The soft prompt, a fixed prompt that need not be words, has {_listed(parts)}."
    behind = differences.get("soft_minus_tuned")
    if behind is not None and tone(behind.ci95) == "worse":
        says += " What the tuned target has beyond it came from other weights, not from a prompt."
    return says


def search_sentence(search: SearchResult) -> str:
    """How the static instruction was found, and at what cost."""
    tokens = "" if search.tokens is None else f", {search.tokens:,} tokens of the target"
    return (
        f"The static instruction ({search.source}) was found among {search.candidates} candidates "
        f"by {search.responses:,} responses to training prompts{tokens}."
    )


def _gap_sentence(gap: GapClosed, start: str, end: str) -> str:
    between = f"the gap between the {arm_title(start)} and the {arm_title(end)}"
    if gap.share is None:
        return f"No share of {between}: {gap.reason or 'the gap was not measured'}."
    return (
        f"The trained prompter closes {share(gap.share)} (95% interval {share_interval(gap.ci95)}) "
        f"of {between}."
    )


def _leads(arms: Mapping[str, ArmResult], one: str, other: str) -> bool:
    return one in arms and other in arms and arms[one].reward.mean > arms[other].reward.mean


def _listed(names: list[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def printable(text: object) -> str:
    """``text`` with control characters and lone surrogates shown as a replacement character."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))
    return shown.encode("utf-8", "replace").decode("utf-8")


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
