"""Headroom and bound as a reader meets them: tables, and what they mean in plain words."""

from __future__ import annotations

import math
from math import log

from alignpro.evaluate.results import (
    BoundReport,
    FrontierPoint,
    GoalsForecast,
    Headroom,
    MixReport,
)
from alignpro.report.grids import Grid
from alignpro.report.words import Verdict, arm_title, interval, number, share

_TERMS = {
    "tv_tuned": "TV of tuned and frozen target",
    "tv_rewrites": "TV of the target with and without untuned rewrites",
    "kl": "KL of the optimum to the untuned prompter (nats)",
}


def frontier_grid(headroom: Headroom) -> Grid:
    """The optimum by kl_coef; rows whose samples do not support the estimate are faint."""
    header = [
        "kl_coef",
        "objective",
        "95% interval",
        "corrected",
        "cross-fit",
        "reward",
        "KL",
        "samples",
    ]
    points, best = headroom.frontier, headroom.recommended
    rows = [
        [
            f"{point.kl_coef:g}",
            number(point.objective.mean),
            interval(point.objective.ci95),
            number(point.corrected_objective and point.corrected_objective.mean),
            number(point.crossfit_objective and point.crossfit_objective.mean),
            number(point.reward),
            number(point.kl, 2),
            number(point.effective_samples, 1),
        ]
        for point in points
    ]
    strong = None if best is None else points.index(best)
    faint = frozenset(i for i, p in enumerate(points) if best is None or p.kl_coef < best.kl_coef)
    return Grid("Optimum by kl_coef, before training", header, rows, strong, faint)


def best_of_n_grid(headroom: Headroom) -> Grid:
    """The best of 1, 2, 4, ... and all rewrites, for reference."""
    rows = [
        [str(best.n), number(best.reward), number(best.crossfit_reward), number(best.kl, 2)]
        for best in headroom.best_of_n
        if best.n & (best.n - 1) == 0 or best.n == headroom.num_rewrites
    ]
    return Grid("Best of n rewrites", ["n", "reward", "cross-fitted", "KL at most"], rows)


def headroom_words(headroom: Headroom) -> list[str]:
    """What there is to gain, at which KL, and how far to trust it: one sentence each."""
    n, m, untuned = headroom.num_rewrites, headroom.num_responses, headroom.untuned
    lines = [
        f"Untuned prompter: reward {number(untuned.mean)} ({interval(untuned.ci95)}), "
        f"{headroom.num_prompts} prompts x {n} rewrites x {m} responses."
    ]
    if headroom.variance is not None:
        lines.append(
            f"Of a reward's variance given the prompt, {share(headroom.variance.prompter_share)} "
            "lies between rewrites; the rest is the target's own noise."
        )
    point = headroom.recommended
    if point is None:
        lines.append(
            f"No kl_coef of the grid leaves a third of {n} rewrites effective: every "
            "estimate rests on one or two rewrites a prompt. Ask for more rewrites or larger "
            "kl_coefs."
        )
        return lines
    lines += [
        f"Smallest kl_coef that these samples support: {point.kl_coef:g} "
        f"({number(point.effective_samples, 1)} of {n} rewrites effective). Forecast of the "
        f"objective there: {number(untuned.mean)} (untuned) to {number(point.objective.high)} (the "
        "upper end).",
        f"The optimum there has reward {number(point.reward)} at a KL of {number(point.kl, 2)} "
        "nats per rewrite.",
        _noise(point, untuned.mean, n, m),
    ]
    if any(p.kl_coef < point.kl_coef for p in headroom.frontier):
        lines.append(
            f"Dim rows rest on one or two rewrites a prompt: {n} rewrites show no KL above "
            f"log {n} = {log(n):.2f}, and training can go further than they say."
        )
    return lines


def _noise(point: FrontierPoint, untuned: float, n: int, m: int) -> str:
    """What the target's noise does to the forecast."""
    crossfit, corrected = point.crossfit_objective, point.corrected_objective
    if crossfit is None or corrected is None:
        return "With one response a rewrite, the target's noise makes the upper end too high."
    choosing = f"Choosing among {n} rewrites by {m - 1} response(s)"
    said = (
        f"{choosing} reaches {number(crossfit.mean)} without training"
        if crossfit.mean > untuned
        else f"{choosing} is not worth its KL ({number(crossfit.mean)}): too few to tell rewrites "
        "apart"
    )
    return f"{said}; {number(corrected.mean)} is the estimate corrected for noise."


def goals_grid(goals: GoalsForecast | None) -> Grid:
    """A row for each part of the reward: where it would end, by whose weights."""
    header = [
        *("goal", "untuned", "alone"),
        *("weight", "reward", "less Z", "max-min", "reward", "less Z"),
    ]
    rows = [
        [
            name,
            number(goal.untuned),
            number(goal.alone),
            f"{goal.weight:g}",
            number(goal.reward),
            number(goal.normalized, sign=True),
            number(goal.maxmin_weight),
            number(goal.maxmin_reward),
            number(goal.maxmin_normalized, sign=True),
        ]
        for name, goal in (goals.goals.items() if goals else ())
    ]
    return Grid("Goals of the reward, before training", header, rows)


def goals_words(goals: GoalsForecast | None) -> list[str]:
    """Who would be worst off, what weights would change that, and how the estimate errs."""
    if goals is None:
        return []
    worst, best, raw = goals.goals[goals.worst], goals.maxmin, goals.raw_maxmin
    idle = [name for name, goal in goals.goals.items() if goal.maxmin_weight == 0.0]
    weights = ", ".join(f"{n} {number(g.raw_maxmin_weight)}" for n, g in goals.goals.items())
    lines = [
        f"At kl_coef {goals.kl_coef:g}, with the weights given, {goals.worst} would be worst off: "
        f"reward {number(worst.reward)}, untuned {number(worst.untuned)}, alone "
        f"{number(worst.alone)}.",
        "Max-min weights serve the least of the goals best, each less its kl_coef log Z: value "
        f"{number(best.value, sign=True)}, KL {number(best.kl, 2)} nats, KKT gap {best.kkt_gap:.1e}"
        f". For rewards as they are: {weights}; value {number(raw.value, sign=True)}, KL "
        f"{number(raw.kl, 2)}, KKT gap {raw.kkt_gap:.1e}.",
    ]
    if idle:
        lines.append(f"No weight: {', '.join(idle)}; the others' mixture serves it as it is.")
    flat = [n for n, g in goals.goals.items() if math.isclose(g.alone, g.untuned, abs_tol=1e-9)]
    if flat:
        lines.append(
            f"No difference between rewrites beyond the noise of responses: {', '.join(flat)}. "
            "Neither its weight nor whether it is worst off means anything; more responses may "
            "tell."
        )
    lines.append(
        f"{number(best.effective_samples, 1)} samples a prompt carry the mixture. From few, goals "
        "look better served than they are, and the one whose rewards vary most gets too little "
        "weight."
    )
    return lines


def mix_grid(mix: MixReport) -> Grid:
    """A row for each goal: its weight, and its implicit reward under four prompters."""
    rows = [
        [
            run,
            goal.reward,
            number(goal.weight),
            number(goal.of_expert, sign=True),
            number(goal.of_mixture, sign=True),
            number(goal.of_drawn, sign=True),
            number(goal.of_adapter, sign=True),
        ]
        for run, goal in mix.goals.items()
    ]
    header = ["run", "reward", "weight", "its prompter", "mixture", "as drawn", "mixed adapter"]
    return Grid("Goals, and the implicit reward of each", header, rows)


def mix_words(mix: MixReport) -> list[str]:
    idle = {run: goal for run, goal in mix.goals.items() if goal.weight == 0.0}
    least = min(goal.of_drawn for goal in mix.goals.values() if goal.weight != 0.0)
    # Of whole rewrites the KKT gap says it.
    worse = {r: g for r, g in idle.items() if g.whole_weight is not None and g.of_drawn < least}
    served = [run for run in idle if run not in worse]
    said = [
        f"KL {mix.kl:.3f} nats per rewrite at kl_coef {mix.kl_coef:g}; KKT gap {mix.kkt_gap:.1e}; "
        f"{mix.effective_samples:.1f} of {mix.samples} samples a prompt carry the weight."
    ]
    if mix.acceptance is not None and mix.expected_acceptance is not None:
        said.append(
            f"Drawn token by token, a rewrite is one of the mixture of whole rewrites with "
            f"probability {number(mix.acceptance.mean)} ({interval(mix.acceptance.ci95)}); the "
            f"prompters' own rewrites say {number(mix.expected_acceptance)}."
        )
    if mix.given_up:
        said.append(f"{mix.given_up:.1%} of the rewrites were taken after the last of their tries.")
    whole = [goal.whole_weight for goal in mix.goals.values()]
    if None not in whole:
        said.append(
            "The weights serve best by what is drawn token by token; of whole rewrites they are "
            f"{', '.join(number(weight) for weight in whole)}."
        )
    if served:
        said.append(f"No weight: {', '.join(served)}; the mixture serves this goal as it is.")
    for run, goal in worse.items():
        said.append(
            f"No weight: {run}, although what is drawn serves it worst "
            f"({number(goal.of_drawn, sign=True)}); no weights that serve it better were found."
        )
    return said


def bound_grid(bound: BoundReport) -> Grid:
    named = [(_TERMS.get(key, key.replace("_", " ")), term) for key, term in bound.terms.items()]
    strong = len(named)
    named += [
        ("bound", bound.bound),
        ("measured gap, tuned target - prompted optimum", bound.measured_gap),
        ("bound - measured gap", bound.slack),
    ]
    if bound.trained_gap is not None:
        named.append(("measured gap, tuned target - trained prompter", bound.trained_gap))
    rows = [[title, number(value.mean), interval(value.ci95)] for title, value in named]
    return Grid(
        "Bound on the gap to a tuned target", ["term", "mean", "95% interval"], rows, strong
    )


def rewards_grid(bound: BoundReport) -> Grid:
    rows = [
        [arm_title(key), number(value.mean), interval(value.ci95)]
        for key, value in bound.rewards.items()
    ]
    return Grid("Rewards", ["of", "mean", "95% interval"], rows)


def bound_verdicts(bound: BoundReport) -> list[Verdict]:
    """Whether it holds, whether it says anything, and what it rests on: one sentence each."""
    holds = "holds" if bound.holds else "DOES NOT HOLD"
    said = Verdict(
        "better" if bound.holds else "worse",
        f"The bound {holds}: measured gap {number(bound.measured_gap.mean)}, bound "
        f"{number(bound.bound.mean)}.",
    )
    return [said, *(Verdict("unclear", text) for text in _about_bound(bound))]


def _about_bound(bound: BoundReport) -> list[str]:
    low, high = bound.reward_range
    span = f"rewards span {number(high - low)}"
    lines = [
        f"It is vacuous: {span}, so no gap can exceed that anyway."
        if bound.vacuous
        else f"It is not vacuous: {span}."
    ]
    if bound.reward_range_source == "observed":
        lines.append(
            f"The range {interval(bound.reward_range)} is what was observed, and so too narrow if "
            "anything; give reward_range to have the true one."
        )
    closed = bound.closed_form
    if closed is not None:
        lines.append(
            f"The tuned target is the closed-form optimum at kl_coef {closed.kl_coef:g}, from "
            f"{number(closed.effective_samples, 1)} effective responses a prompt: its reward "
            "and total variation are too low if anything."
        )
    if bound.num_responses == 1:
        lines.append(
            "With one response a rewrite, the target's noise makes the KL and the reward of the "
            "prompted optimum too high, and so bound and gap too small."
        )
    if bound.truncated_responses > 0:
        lines.append(
            f"{share(bound.truncated_responses)} of the responses were cut off at the last allowed "
            "token: the total variation is that of the process so truncated, as is the reward."
        )
    return lines


def bound_facts(bound: BoundReport) -> list[tuple[str, str]]:
    return [
        ("reward range", f"{interval(bound.reward_range)}, {bound.reward_range_source}"),
        ("kl_coef", f"{bound.kl_coef:g}"),
        ("tuned target", bound.tuned),
    ]
