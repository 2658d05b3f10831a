"""Means with intervals, paired differences, and the two sources of a reward's variance.

The independent unit is the prompt: several responses to one prompt are averaged first, and the
intervals resample prompts (a cluster bootstrap), since responses to one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK_ELEMENTS = 1 << 22  # resampled values held at once: 32 MiB


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def bootstrap_mean_ci(
    values: Sequence[float] | NDArray[np.floating],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Mean of per-prompt ``values`` [n] with its percentile bootstrap interval (Efron 1979).

    The same seed gives the same interval. Needs n >= 2; n below about 20 gives intervals that are
    somewhat too narrow. Raises ValueError for fewer values, NaN, or a level outside (0, 1).
    """
    x = _finite("values", values, dimensions=1)
    if x.size < 2:
        raise ValueError(f"values: expected at least 2 for an interval, got {x.size}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CHUNK_ELEMENTS // x.size)
    for begin in range(0, resamples, chunk):
        end = min(begin + chunk, resamples)
        means[begin:end] = x[rng.integers(x.size, size=(end - begin, x.size))].mean(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(x.mean()), float(low), float(high))


def paired_difference(
    treated: Sequence[float] | NDArray[np.floating],
    control: Sequence[float] | NDArray[np.floating],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Mean of ``treated - control`` over the same prompts [n], with its bootstrap interval.

    Pairing takes out what prompts have in common, so the interval is narrower than that of two
    independent means. Raises ValueError where the lengths differ or n < 2.
    """
    a = _finite("treated", treated, dimensions=1)
    b = _finite("control", control, dimensions=1)
    if a.size != b.size:
        raise ValueError(f"expected values of the same prompts, got {a.size} and {b.size}")
    return bootstrap_mean_ci(a - b, seed=seed, level=level, resamples=resamples)


def variance(values: Sequence[float] | NDArray[np.floating]) -> float:
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
        between = max(self.between_rewrites, 0.0)
        total = between + self.within_rewrite
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


def _finite(name: str, values: ArrayLike, *, dimensions: int) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected numbers in {dimensions} dimension(s): {error}"
        ) from error
    if array.ndim != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array
