"""Means with intervals, paired differences, win rates, and the two sources of a reward's variance.

The independent unit is the prompt: several responses to one prompt are averaged first, and the
intervals resample prompts (a cluster bootstrap), since responses to one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CHUNK_ELEMENTS = 1 << 22  # resampled values held at once: 32 MiB


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> tuple[float, float]:
        """Its ends, of an interval at the usual level."""
        return self.low, self.high


def bootstrap_mean_ci(
    values: ArrayLike, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> Interval:
    """Mean of per-prompt ``values`` [n] with its percentile bootstrap interval (Efron 1979).

    The same seed gives the same interval. Needs n >= 2; n below about 20 gives intervals that are
    somewhat too narrow. Raises ValueError for fewer values, NaN, or a level outside (0, 1).
    """
    x = _finite("values", values, dimensions=1)
    if x.size < 2:
        raise ValueError(f"values: expected at least 2 for an interval, got {x.size}")
    means = [x[drawn].mean(axis=1) for drawn in _resampled(x.size, seed, resamples)]
    return _percentiles(float(x.mean()), np.concatenate(means), level)


def paired_difference(treated: ArrayLike, control: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean of ``treated - control`` over the same prompts [n], with its bootstrap interval.

    Pairing takes out what prompts have in common, so the interval is narrower than that of two
    independent means. Raises ValueError where the lengths differ or n < 2.
    """
    a, b = _paired(treated=treated, control=control)
    return bootstrap_mean_ci(a - b, seed=seed)


def ratio_of_means(numerator: ArrayLike, denominator: ArrayLike, *, seed: int = 0) -> Interval:
    """mean(numerator) / mean(denominator) over the same prompts [n], n >= 2, with the percentile
    interval of a bootstrap that resamples prompts, and so both together.

    It means something only where the denominator's own interval stays clear of 0: ask
    `bootstrap_mean_ci` first. Raises ValueError where its mean is 0 or the lengths differ.
    """
    a, b = _paired(numerator=numerator, denominator=denominator)
    if b.mean() == 0:
        raise ValueError("denominator: expected a mean other than 0")
    ratios = []
    for drawn in _resampled(a.size, seed):
        top, bottom = a[drawn].mean(axis=1), b[drawn].mean(axis=1)
        ratios.append(top[bottom != 0] / bottom[bottom != 0])
    return _percentiles(float(a.mean() / b.mean()), np.concatenate(ratios))


def relative_reduction(
    treated: ArrayLike,
    treated_of: ArrayLike,
    control: ArrayLike,
    control_of: ArrayLike,
    *,
    seed: int = 0,
) -> Interval:
    """How much lower the ratio sum(treated) / sum(treated_of) is than that of the control, as a
    share of the latter, over the same prompts [n], with the percentile interval of a bootstrap that
    resamples prompts, all four together.

    Raises ValueError where lengths differ, n < 2, or the control has nothing to reduce.
    """
    a, a_of = _paired(treated=treated, treated_of=treated_of)
    b, b_of = _paired(control=control, control_of=control_of)
    _paired(treated=a, control=b)
    if not (a_of.sum() > 0 and b_of.sum() > 0 and b.sum() > 0):
        raise ValueError("control: expected a ratio above 0, and a treated one")

    def reduction(x: Floats, x_of: Floats, y: Floats, y_of: Floats) -> Floats:
        defined = (x_of > 0) & (y_of > 0) & (y > 0)
        shares: Floats = 1 - (x * y_of)[defined] / (x_of * y)[defined]
        return shares

    four = (a, a_of, b, b_of)
    draws = [reduction(*(v[drawn].sum(axis=1) for v in four)) for drawn in _resampled(a.size, seed)]
    whole = reduction(*(np.array([v.sum()]) for v in four))
    return _percentiles(float(whole[0]), np.concatenate(draws))


def variance_change(
    treated: Sequence[Sequence[float]], control: Sequence[Sequence[float]], *, seed: int = 0
) -> Interval:
    """The variance of all ``treated`` values over that of the control's, less 1 (-0.2: a fifth
    lower), with the percentile interval of a bootstrap that resamples prompts, both together.
    Values [n][m] are those of each prompt; m may differ.

    Raises ValueError where n < 2, the prompts differ in number, or the control does not vary.
    """
    moments = []
    for name, rows in (("treated", treated), ("control", control)):
        values = [_finite(name, row, dimensions=1) for row in rows]
        if len(values) != len(control) or len(values) < 2:
            raise ValueError(
                f"expected at least 2 prompts, the same for both, got {len(treated)} and "
                f"{len(control)}"
            )
        centre = float(np.concatenate(values).mean())  # so that sums of squares cancel nothing
        centred = [v - centre for v in values]
        moments.append(np.array([[v.size, v.sum(), np.square(v).sum()] for v in centred]))

    def unbiased(sums: Floats) -> Floats:  # [draws, 3] -> [draws]
        count, total, squares = sums.T
        return np.asarray((squares - total**2 / count) / (count - 1))

    of_treated, of_control = (unbiased(m.sum(axis=0, keepdims=True)) for m in moments)
    if not of_control[0] > 0:
        raise ValueError("control: expected values that vary")
    draws = []
    for drawn in _resampled(len(control), seed):
        a, b = (unbiased(m[drawn].sum(axis=1)) for m in moments)
        draws.append(a[b > 0] / b[b > 0] - 1)
    return _percentiles(float(of_treated[0] / of_control[0]) - 1, np.concatenate(draws))


def binomial_at_most(successes: int, trials: int, probability: float) -> float:
    """P(Binomial(trials, probability) <= successes), to about 1e-12."""
    if successes < 0:
        return 0.0
    if successes >= trials or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * log_p + (trials - k) * log_q
        for k in range(successes + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def proportion_ci(successes: float, trials: int, *, level: float = 0.95) -> Interval:
    """A share with its exact binomial interval (Clopper and Pearson 1934), which also speaks of 0
    and of all. successes: of whole trials, or a sum of shares, whose interval is rounded outward.

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"successes: expected 0 to {trials} of 1 or more, got {successes}")
    few, many = math.floor(successes), math.ceil(successes)
    tail = (1 - level) / 2
    low = 0.0 if few == 0 else _root(lambda p: 1 - binomial_at_most(few - 1, trials, p) - tail)
    high = 1.0 if many == trials else _root(lambda p: tail - binomial_at_most(many, trials, p))
    return Interval(successes / trials, low, high)


def _root(rises: Callable[[float], float]) -> float:
    """Where a function that rises in [0, 1] is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return (low + high) / 2


def length_controlled_win_rate(
    preferences: ArrayLike,
    length_differences: ArrayLike,
    *,
    prompts: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """The win rate a judge would give at equal lengths (Dubois et al. 2024, arXiv 2404.04475).

    ``P(win) = sigmoid(a + b tanh(d / rms(d)))`` is fitted to the pairs and read at d = 0, which is
    ``sigmoid(a)``. The scale of d is its root mean square, not its deviation from the mean: with
    responses that are all about as much longer, the latter would leave nothing of d but a second
    intercept. Weak normal priors (a: 10, b: 2.5 standard deviations, as Gelman et al. 2008, arXiv
    0901.4011, scale theirs) keep the fit finite where one side or the longer one always wins.

    Where every d has the same sign, d = 0 lies outside of what was seen: an extrapolation.

    Args:
        preferences: [pairs], 1 for a win, 0 for a loss, 0.5 for a tie.
        length_differences: [pairs], of the side whose wins are counted minus the other's.
        prompts: [pairs], each pair's prompt, the unit that is resampled; None: each has its own.

    Raises:
        ValueError: lengths that differ, a preference outside [0, 1], fewer than 2 prompts.
        ImportError: scipy is missing.
    """
    from scipy.special import expit

    y = _finite("preferences", preferences, dimensions=1)
    d = _finite("length_differences", length_differences, dimensions=1)
    cluster = np.arange(y.size) if prompts is None else np.asarray(prompts)
    if not y.size == d.size == cluster.size:
        raise ValueError(f"expected aligned pairs, got {y.size}, {d.size} and {cluster.size}")
    if ((y < 0) | (y > 1)).any():
        raise ValueError("preferences: expected numbers between 0 and 1")
    names, cluster = np.unique(cluster, return_inverse=True)
    if names.size < 2:
        raise ValueError(f"prompts: expected at least 2 for an interval, got {names.size}")
    scale = float(np.sqrt(np.square(d).mean()))
    x = np.tanh(d / scale) if scale > 0 else np.zeros_like(d)
    whole = _fit_logistic(x, y, np.ones_like(y), np.zeros(2))
    draws = []
    for drawn in _resampled(names.size, seed, resamples):
        for row in drawn:
            weight = np.bincount(row, minlength=names.size)[cluster].astype(np.float64)
            draws.append(_fit_logistic(x, y, weight, whole)[0])
    return _percentiles(float(expit(whole[0])), expit(np.array(draws)))


def _fit_logistic(x: Floats, y: Floats, weight: Floats, start: Floats) -> Floats:
    """Intercept and slope of the posterior mode; y [n] may be fractions."""
    from scipy.optimize import minimize
    from scipy.special import expit

    design = np.stack([np.ones_like(x), x], axis=1)
    precision = np.array(_PRIOR_DEVIATIONS) ** -2.0

    def loss(beta: Floats) -> tuple[float, Floats]:
        eta = design @ beta
        value = weight @ (np.logaddexp(0.0, eta) - y * eta) + 0.5 * precision @ beta**2
        residual = weight * (expit(eta) - y)
        return float(value), design.T @ residual + precision * beta

    found: Floats = minimize(loss, start, jac=True, method="BFGS").x
    return found


_PRIOR_DEVIATIONS = (10.0, 2.5)  # of intercept and slope


@dataclass(frozen=True)
class CalibrationBin:
    """What was given a probability in [low, high)."""

    low: float
    high: float
    count: int
    confidence: float  # mean of the probabilities
    accuracy: float  # mean of the outcomes


@dataclass(frozen=True)
class Calibration:
    """How often what was given a probability came true."""

    error: float  # expected calibration error: the bins' mean |accuracy - confidence|, by count
    brier: float  # mean squared difference of probability and outcome
    bins: list[CalibrationBin]  # those that are not empty


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 20) -> Calibration:
    """Of ``probabilities`` [n] in [0, 1] against ``outcomes`` [n] in [0, 1], in bins of equal width
    (Guo et al. 2017, arXiv 1706.04599). The error of few observations is biased upwards.

    Raises ValueError for other values, none, or lengths that differ.
    """
    p = _finite("probabilities", probabilities, dimensions=1)
    y = _finite("outcomes", outcomes, dimensions=1)
    if p.size != y.size or not p.size:
        raise ValueError(f"expected aligned values, at least one, got {p.size} and {y.size}")
    if (np.minimum(p, y) < 0).any() or (np.maximum(p, y) > 1).any():
        raise ValueError("probabilities and outcomes: expected numbers between 0 and 1")
    place = np.minimum((p * bins).astype(int), bins - 1)
    found = [
        CalibrationBin(
            b / bins,
            (b + 1) / bins,
            int((place == b).sum()),
            float(p[place == b].mean()),
            float(y[place == b].mean()),
        )
        for b in np.unique(place).tolist()
    ]
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in found) / p.size
    return Calibration(float(error), float(np.square(p - y).mean()), found)


def variance(values: ArrayLike) -> float:
    """Unbiased sample variance of ``values`` [n], n >= 2."""
    x = _finite("values", values, dimensions=1)
    if x.size < 2:
        raise ValueError(f"values: expected at least 2 for a variance, got {x.size}")
    return float(x.var(ddof=1))


@dataclass(frozen=True)
class VarianceSplit:
    """Unbiased estimates of where a reward's variance, given the prompt, comes from."""

    between_rewrites: float  # Var_x'( R(x, x') ): what the prompter can act on; may be < 0
    within_rewrite: float  # E_x' Var_y( r(x, y) ): the target's own noise

    @property
    def prompter_share(self) -> float:
        """between / (between + within), in [0, 1]; 0 where nothing varies."""
        return self.share_of_means(1)

    def share_of_means(self, responses: int) -> float:
        """between / (between + within / responses): the rewrites' own share of the variance of
        means over that many responses, in [0, 1]; 0 where nothing varies."""
        between = max(self.between_rewrites, 0.0)
        total = between + self.within_rewrite / responses
        return between / total if total > 0 else 0.0


def law_of_total_variance(rewards: ArrayLike) -> VarianceSplit:
    """Splits the variance of ``rewards`` [P, N, M] (prompts, rewrites, responses), N and M >= 2.

    ``Var(r | x) = Var_x'(R) + E_x'[Var_y(r)]`` (MATH: nested sampling), estimated within each
    prompt and averaged over prompts. The variance of the N means over-counts by the mean's own
    noise, ``within / M``, which is subtracted: unbiased, hence possibly negative when small.
    """
    r = _finite("rewards", rewards, dimensions=3)
    prompts, n, m = r.shape
    if prompts < 1 or n < 2 or m < 2:
        raise ValueError(
            "rewards: expected [prompts >= 1, rewrites >= 2, responses >= 2] to tell the "
            f"sources of variance apart, got {r.shape}"
        )
    within = float(r.var(axis=2, ddof=1).mean())
    of_means = float(r.mean(axis=2).var(axis=1, ddof=1).mean())
    return VarianceSplit(between_rewrites=of_means - within / m, within_rewrite=within)


def _resampled(count: int, seed: int, resamples: int = 10_000) -> Iterator[NDArray[np.int64]]:
    """Indices [some resamples, count] drawn with replacement, in chunks that bound the memory."""
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // count)
    for begin in range(0, resamples, chunk):
        yield rng.integers(count, size=(min(chunk, resamples - begin), count))


def _percentiles(estimate: float, draws: Floats, level: float = 0.95) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return Interval(estimate, float(low), float(high))


def _paired(**values: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (_finite(name, given, dimensions=1) for name, given in values.items())
    if a.size != b.size or a.size < 2:
        raise ValueError(
            f"expected at least 2 values of the same prompts, got {a.size} and {b.size}"
        )
    return a, b


def _finite(name: str, values: ArrayLike, *, dimensions: int) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name}: expected numbers in {dimensions} dimension(s): {error}"
        raise ValueError(message) from error
    if array.ndim != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array
