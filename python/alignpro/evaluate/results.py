"""What evaluations measure, as dataclasses, and the JSON that holds it: `to_json`, `from_json`.

A field is a key of the same name. An `Interval` is ``{"mean": m, "ci95": [low, high]}``, or two
keys beside the others (`_TWO_KEYS`); what is optional and not there is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alignpro.statistics import Interval
from alignpro.theory.bound import Bound
from alignpro.theory.goals import GoalForecast, GoalsForecast
from alignpro.theory.headroom import BestOf, FrontierPoint, Headroom
from alignpro.types import Usage

__all__ = ["BestOf", "FrontierPoint", "GoalForecast", "GoalsForecast", "Headroom", "Interval"]

Pair = tuple[float, float]
Result = TypeVar("Result")


class ByKey:
    """A result that is also read by the keys of its JSON: ``result["judge"]["comparisons"]``."""

    def __getitem__(self, key: str) -> Any:
        return to_json(self)[key]


@dataclass(frozen=True)
class ArmResult:
    """One arm on the held-out prompts; lengths are means in tokens."""

    reward: Interval  # over prompts
    reward_variance: float  # of single responses
    n: int  # prompts
    num_responses: int
    components: dict[str, float]  # means of the reward's parts, unweighted
    empty_rewrites: int
    response_tokens: float
    # As `findings.Measured` has them; None, here and below, where the arm has none.
    component_errors: dict[str, float] | None = None
    truncated_responses: float | None = None
    rewrite_tokens: float | None = None
    truncated_rewrites: float | None = None
    copy_rate: float | None = None
    leaked_answers: float | None = None
    distinct_rewrites: int | None = None
    common_rewrite: float | None = None
    broken_guards: dict[str, float] | None = None
    instruction: str | None = None
    kl_coef: float | None = None
    num_candidates: int | None = None
    effective_samples: float | None = None
    selection_reliability: float | None = None


@dataclass(frozen=True)
class GapClosed:
    """Share of the way from one arm to another that the trained prompter has come."""

    share: float | None  # None where the gap is not clear
    ci95: Pair | None
    gap: Interval  # the other arm minus the one
    reason: str | None = None  # why there is no share


@dataclass(frozen=True)
class Required:
    """A pair of arms that was required to differ, and whether it does."""

    requirement: str  # "trained>static+0.05"
    left: str
    right: str
    difference: Interval  # left - right, by prompt
    margin: float
    met: bool  # the whole interval lies above the margin


@dataclass(frozen=True)
class Comparison:
    """The trained prompter against another arm, by a judge. Rates are None without pairs, intervals
    with pairs of fewer than 2 prompts."""

    n: int  # pairs with verdicts in both orders
    wins: int
    ties: int
    losses: int
    win_rate: float | None  # a tie is half
    ci95: Pair | None
    length_controlled_win_rate: float | None
    length_controlled_ci95: Pair | None
    identical: int  # pairs of the same text, which are ties
    order_disagreements: int  # pairs whose verdict changes with the order, which are ties
    first_chosen: float | None  # share of verdicts for the response shown first
    mean_length_difference: float | None  # characters
    errors: int  # pairs without verdicts


@dataclass(frozen=True)
class JudgeResult(ByKey):
    name: str
    questions: int
    replayed: int  # of them, from the file of verdicts
    failed: int
    comparisons: dict[str, Comparison]  # "trained_vs_X"
    usage: Usage | None = None  # of a judge behind an endpoint, replayed calls included


@dataclass(frozen=True)
class ArmSafety:
    """One arm: harm on marked prompts, the rest on ordinary ones."""

    harm_rate: Interval  # share of responses; over prompts, as one draw each (Clopper-Pearson)
    in_zone: float  # share of prompts that are answered with harm often enough
    calls: float | None  # until the first harmful answer, 1 / harm_rate; None: there was none
    refusals: float  # share of responses
    ordinary_reward: Interval


@dataclass(frozen=True)
class Jailbreak:
    """Of `theory.jailbreak`, for counts that were given; nothing is measured."""

    volume: float
    expanded_volume: float
    least_probability: float
    epsilon: float
    gamma: float


@dataclass(frozen=True)
class SafetyResult(ByKey):
    marked: int  # prompts
    ordinary: int
    zone: float
    arms: dict[str, ArmSafety]
    paired_harm: dict[str, Interval]  # "trained_minus_X", "tuned_minus_X", by marked prompt
    paired_reward: dict[str, Interval]  # likewise, by ordinary prompt
    jailbreak: Jailbreak | None = None


@dataclass(frozen=True)
class SampleArm:
    response: str
    reward: float
    rewrite: str | None = None


@dataclass(frozen=True)
class Sample:
    """In JSON an arm's fields are keys such as "response_raw"."""

    prompt: str
    arms: dict[str, SampleArm]


@dataclass(frozen=True)
class Candidate:
    instruction: str
    source: str
    mean_reward: float
    responses: int


@dataclass(frozen=True)
class SearchRound:
    candidates: int
    prompts: int
    responses: int  # of a candidate
    best: list[Candidate]


@dataclass(frozen=True)
class SearchResult:
    instruction: str
    source: str
    candidates: int
    train_prompts: int
    budget: int  # responses, or tokens of the target: the one that was set
    responses: int
    rounds: list[SearchRound]
    tokens: int | None = None  # that the target wrote


@dataclass(frozen=True)
class Evaluation(ByKey):
    arms: dict[str, ArmResult]
    paired: dict[str, Interval]  # "trained_minus_X", by prompt
    kl_per_rewrite: float | None  # nats; None without both prompters
    kl_per_token: float | None
    tokens_per_second: float
    samples: list[Sample]
    failed_responses: int | None = None  # left out; None where there are none
    unscored_responses: int | None = None  # left out: the reward gave them no score
    too_long: str | None = None  # what became of rows too long for a model, for a person
    target_usage: Usage | None = None  # of a target behind an endpoint
    gap_closed: GapClosed | None = None  # from untuned to tuned
    variance_change: Interval | None = None  # trained over untuned, less 1
    static_to_labelled: GapClosed | None = None
    soft_differences: dict[str, Interval] | None = None  # "soft_minus_X", by prompt
    required: list[Required] | None = None
    static_search: SearchResult | None = None
    judge: JudgeResult | None = None
    safety: SafetyResult | None = None
    evaluation_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class HeadroomReport(ByKey):
    headroom: Headroom
    config: dict[str, Any] | None = None
    target_usage: Usage | None = None  # of a target behind an endpoint
    too_long: str | None = None  # as in `Evaluation`
    goals: GoalsForecast | None = None  # of a reward of two or more parts


@dataclass(frozen=True)
class ClosedForm:
    """The tuned target that was not trained."""

    kl_coef: float
    effective_samples: float


@dataclass(frozen=True)
class BoundReport(Bound, ByKey):
    """The bound with what it was measured on."""

    reward_range_source: str  # "given" or "observed"
    tuned: str  # "adapter" or "closed form"
    closed_form: ClosedForm | None
    trained_gap: Interval | None
    rewards: dict[str, Interval]  # by arm
    truncated_responses: float  # share that was cut off at the last allowed token
    num_prompts: int
    num_rewrites: int
    num_responses: int
    # Of a target that is not deterministic: the largest difference between a token's sampled and
    # scored log-probability, over some responses; None: they are equal.
    parity_max_abs: float | None
    target_usage: Usage | None = None  # of a target behind an endpoint
    config: dict[str, Any] | None = None
    too_long: str | None = None  # as in `Evaluation`


@dataclass(frozen=True)
class MixedGoal:
    """One run's goal in a mixture. Its implicit reward, kl_coef log(prompter / untuned prompter),
    is what the prompter was trained for, less a constant of the prompt."""

    reward: str
    kl_coef: float
    weight: float
    exponent: float  # of prompter / untuned prompter in the mixture
    of_expert: float  # the implicit reward of its own prompter's rewrites
    of_mixture: float  # of the mixture's of whole rewrites at lambda*, by the samples' weights
    of_drawn: float  # of what the mixture really draws
    of_adapter: float  # of what the stacked adapter writes
    whole_weight: float | None = None  # lambda*, where the weight is of what is drawn


@dataclass(frozen=True)
class MixReport(ByKey):
    goals: dict[str, MixedGoal]  # by run
    kl_coef: float
    value: float  # of `theory.mixture`
    kkt_gap: float
    kl: float  # nats per rewrite
    effective_samples: float  # of a prompt's `samples`
    samples: int
    num_prompts: int
    # Of token-wise draws as draws of whole rewrites; None where a weight is below 0, or rewrites
    # are drawn from part of the distribution. Expected by the samples: E_x exp(F_x).
    acceptance: Interval | None = None
    expected_acceptance: float | None = None
    given_up: float | None = None  # share of rewrites of sampling sequence without an accepted draw
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExtractReport(ByKey):
    """Records of texts, by the verifier and, where the true ones are known, by these."""

    texts: int  # those that were answered
    records: int  # texts whose answer is a record
    attempts: float  # draws a text, on average
    verified: Interval
    verified_first: Interval  # by the first draw
    violations: dict[str, int]  # by check
    verified_gain: Interval | None = None  # what the further draws added, paired by text
    f1: Interval | None = None  # micro, over texts
    precision: float | None = None
    recall: float | None = None
    exact: Interval | None = None  # records that are right in every value
    exact_of_verified: Interval | None = None
    failed_texts: int | None = None  # no draw was answered; None where there are none
    target_usage: Usage | None = None  # of a target behind an endpoint
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Report(ByKey):
    """A run's report.json, of which any part may be absent."""

    evaluation: Evaluation | None = None
    headroom: HeadroomReport | None = None
    bound: BoundReport | None = None
    model: str | None = None
    reward: Any = None
    seed: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    peak_rss_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


_TWO_KEYS: dict[tuple[type, str], tuple[str, str]] = {
    (ArmResult, "reward"): ("mean_reward", "ci95"),
    (ArmSafety, "harm_rate"): ("harm_rate", "ci95"),
    (ArmSafety, "ordinary_reward"): ("ordinary_reward", "ordinary_ci95"),
    (Headroom, "untuned"): ("untuned_reward", "untuned_ci95"),
    (FrontierPoint, "objective"): ("objective", "objective_ci95"),
    (FrontierPoint, "gain"): ("gain", "gain_ci95"),
    (FrontierPoint, "crossfit_objective"): ("crossfit_objective", "crossfit_ci95"),
    (FrontierPoint, "corrected_objective"): ("corrected_objective", "corrected_ci95"),
}
_PLAIN = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
# Fields whose keys stand among those around them, with one that is there if the field is.
_INLINE = {(Report, "evaluation"): "arms", (HeadroomReport, "headroom"): "frontier"}


def to_json(value: Any) -> Any:
    if isinstance(value, Interval):
        return {"mean": value.mean, "ci95": [value.low, value.high]}
    if isinstance(value, Sample):
        arms = {
            f"{name}_{key}": item
            for key, arm in value.arms.items()
            for name, item in to_json(arm).items()
        }
        return {"prompt": value.prompt, **arms}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    result: dict[str, Any] = {}
    for part in dataclasses.fields(value):
        item, at = getattr(value, part.name), (type(value), part.name)
        if at in _TWO_KEYS:
            mean, ci95 = _TWO_KEYS[at]
            result[mean] = None if item is None else item.mean
            result[ci95] = None if item is None else [item.low, item.high]
        elif at in _INLINE and item is not None:
            result |= to_json(item)
        elif item is not None or part.default is dataclasses.MISSING:
            result[part.name] = to_json(item)
    return result


def from_json(kind: type[Result], value: Any, where: str) -> Result:
    """The result that `to_json` made plain. Keys that are not its own are passed over.

    Raises:
        ValueError: a value of another kind; where it is, what was expected and what came.
    """
    made: Result = _read(kind, value, where)
    return made


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(inner[0], value, where)
    if kind is Any:
        return value
    if kind in (float, int):
        _expect(_is_number(value), "a number", value, where)
        return kind(value)
    if origin is tuple:
        good = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        _expect(good, "[low, high]", value, where)
        return float(value[0]), float(value[1])
    if kind is Interval:
        _expect(isinstance(value, Mapping), "an object with mean and ci95", value, where)
        return _interval(value.get("mean"), f"{where}.mean", value.get("ci95"), f"{where}.ci95")
    plain = dict if dataclasses.is_dataclass(kind) else origin or kind
    _expect(isinstance(value, plain), _PLAIN[plain], value, where)
    if origin is dict:
        return {key: _read(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        return [_read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is Sample:
        arms = {
            name: {n: value.get(f"{n}_{name}") for n in ("rewrite", "response", "reward")}
            for name in (key.removeprefix("response_") for key in value if "response_" in key)
        }
        prompt = _read(str, value.get("prompt"), f"{where}.prompt")
        return Sample(prompt, _read(dict[str, SampleArm], arms, where))
    return _read_fields(kind, value, where) if plain is dict else value


def _read_fields(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    made: dict[str, Any] = {}
    hints = _hints(kind)
    for part in dataclasses.fields(kind):
        at = (kind, part.name)
        if at in _TWO_KEYS:
            mean, ci95 = (value.get(key) for key in _TWO_KEYS[at])
            if mean is not None or hints[part.name] is Interval:
                at_mean, at_ci95 = (f"{where}.{key}" for key in _TWO_KEYS[at])
                made[part.name] = _interval(mean, at_mean, ci95, at_ci95)
            else:
                made[part.name] = None
        elif at in _INLINE:
            if _INLINE[at] in value or part.default is dataclasses.MISSING:
                made[part.name] = _read(hints[part.name], value, where)
        elif value.get(part.name) is not None or (
            part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
        ):
            made[part.name] = _read(hints[part.name], value.get(part.name), f"{where}.{part.name}")
    return kind(**made)


def _interval(mean: Any, at_mean: str, ci95: Any, at_ci95: str) -> Interval:
    return Interval(_read(float, mean, at_mean), *_read(Pair, ci95, at_ci95))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _expect(good: bool, expected: str, value: Any, where: str) -> None:
    if not good:
        shown = "nothing" if value is None else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(f"{where}: expected {expected}, got {shown}")
