"""Several prompters as one: the weights that serve the worst-off goal best.

Prompter k was trained for goal k from one reference: rho_k ~ rho_ref exp(r_k / beta_k). Its
*implicit reward* beta_k log(rho_k / rho_ref) is r_k less a constant of the prompt, which makes
goals comparable. The prompter that maximises the least of them, less beta KL(. || rho_ref), is

    rho* ~ rho_ref exp(sum_k lambda_k r_k / beta) ~ rho_ref prod_k (rho_k / rho_ref)^e_k,
    e_k = lambda_k beta_k / beta,    lambda* = argmin over the simplex of F(lambda),
    F(lambda) = E_x log E_{x' ~ rho_ref} prod_k (rho_k / rho_ref)^e_k

(MPO, arXiv 2502.18699; exponents for unequal beta_k are derived here). F is convex, and at lambda*
its derivatives are equal where lambda is above 0 and no smaller elsewhere: the KKT gap. Drawn from
the prompters themselves the weights of the mean are bounded, from the reference they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignpro.statistics import Floats
from alignpro.theory.optimum import optimum_objective

_STEPS = 200
_TOLERANCE = 1e-10
_ROUNDS = 8  # of draws by which weights are found
_LEAST_STEP = 0.01  # of a weight; less is the draws' noise


@dataclass(frozen=True)
class MixtureWeights:
    """lambda*, and what shows that it is."""

    weights: Floats  # [K] lambda, of the simplex
    exponents: Floats  # [K] of rho_k / rho_ref
    value: float  # F, at most 0 where all beta are equal
    gradient: Floats  # [K] of F by lambda
    kkt_gap: float  # how far the gradient is from what an optimum has; 0 at it
    implicit: Floats  # [K] E_x E_rho* beta_k log(rho_k / rho_ref), nats times beta_k
    kl: float  # E_x KL(rho* || rho_ref), nats
    effective_samples: float  # of a prompt's, mean over prompts


def maxmin_weights(
    log_ratios: ArrayLike,
    log_importance: ArrayLike,
    *,
    betas: ArrayLike | None = None,
    beta: float | None = None,
) -> MixtureWeights:
    """lambda* from samples.

    Args:
        log_ratios: [P, S, K] log(rho_k / rho_ref) of sample s of prompt p.
        log_importance: [P, S] log(rho_ref / q), q what the samples were drawn from: the mean of the
            K prompters, where each drew S / K of them.
        betas: [K] the kl_coef that each was trained with; None: equal ones. beta: of the mixture;
            None: their mean.

    Raises ValueError for other shapes, a beta not above 0, or numbers that are not finite.
    """
    ratios, importance = np.asarray(log_ratios, float), np.asarray(log_importance, float)
    if ratios.ndim != 3 or ratios.shape[2] < 1 or importance.shape != ratios.shape[:2]:
        raise ValueError(
            "log_ratios: expected [prompts, samples, 1 or more prompters] and log_importance "
            f"[prompts, samples], got {ratios.shape} and {importance.shape}"
        )
    count = ratios.shape[2]
    given = np.ones(count) if betas is None else np.asarray(betas, float)
    mixed = float(given.mean()) if beta is None else beta
    if given.shape != (count,) or not (given > 0).all() or not mixed > 0:
        raise ValueError(f"betas: expected {count} numbers above 0 and beta another, got {betas!r}")
    if not (np.isfinite(ratios).all() and np.isfinite(importance).all()):
        raise ValueError("log_ratios, log_importance: expected finite numbers")
    scaled = ratios * (given / mixed)
    weights = _minimise(scaled, importance)
    value, gradient, _, probability = _look(scaled, importance, weights)
    implicit = np.einsum("ps,psk->k", probability, ratios) / len(ratios) * given
    active = weights > 0
    level = float(gradient[active] @ weights[active])
    below = np.maximum(0.0, level - gradient[~active])
    gap = max(float(np.abs(gradient[active] - level).max()), float(below.max(initial=0.0)))
    return MixtureWeights(
        weights=weights,
        exponents=exponents_of(weights, given, mixed),
        value=value,
        gradient=gradient,
        kkt_gap=gap,
        implicit=implicit,
        # log(rho* / rho_ref) = sum_k e_k log(rho_k / rho_ref) - log Z, whose mean log Z is F.
        kl=float(level - value),
        effective_samples=float((1.0 / (probability**2).sum(axis=1)).mean()),
    )


def exponents_of(weights: ArrayLike, betas: ArrayLike, beta: float) -> Floats:
    """[K] of rho_k / rho_ref in the mixture of these weights. betas, beta: as `maxmin_weights`."""
    exponents: Floats = np.asarray(weights, float) * np.asarray(betas, float) / beta
    return exponents


def balance_weights(
    weights: ArrayLike, log_ratios: ArrayLike, betas: ArrayLike, beta: float
) -> Floats:
    """Weights of which draws serve the goals more alike than those that these were drawn with.

    Drawn token by token, the mixture is another distribution than that of whole rewrites, whose
    lambda* may leave one goal far behind in it. A step of Newton's method towards the same
    condition, with what is drawn in the place of rho*: its mean implicit rewards equal where there
    is weight, their derivatives by the weights being its covariances (which they are for rho*).
    [derived]

    Args:
        weights: [K] of the simplex, that the samples were drawn with.
        log_ratios: [P, S, K] log(rho_k / rho_ref) of them. betas, beta: as of `maxmin_weights`.
    """
    before = np.asarray(weights, float)
    scaled = np.asarray(log_ratios, float) * (np.asarray(betas, float) / beta)
    _, served, covariance, _ = _look(scaled, -scaled @ before, before)
    active = (before > 0) | (served < served @ before)
    after = np.maximum(0.0, before + _face_step(before, active, served, covariance))
    balanced: Floats = after / after.sum()
    return balanced


def balance_draws(
    weights: ArrayLike,
    draw: Callable[[Floats], tuple[Floats, Floats]],
    betas: ArrayLike,
    beta: float,
) -> tuple[Floats, int]:
    """Weights whose draws serve the worst-off goal best, of a few rounds of `balance_weights`, and
    the number of their round, from 0.

    A step starts from the best weights so far, and is halved where it served the worst-off goal
    less: where prompters went far apart, draws turn from one's rewrites to another's within a small
    change of the weights, and full steps go to and fro between them.

    Args:
        weights: [K] to begin with. betas, beta: as of `maxmin_weights`.
        draw: what these weights draw: [P, S, K] log(rho_k / rho_ref), [P, S] log(drawn / rho_ref).
    """
    best, at, value = np.asarray(weights, float), 0, -math.inf
    here, aim, step = best, best, 1.0
    for number in range(_ROUNDS):
        ratios, from_reference = draw(here)
        served = np.asarray(betas, float) * ratios.mean(axis=(0, 1))
        found = float(served.min() - beta * from_reference.mean())
        if found > value:
            best, at, value = here, number, found
            aim, step = balance_weights(here, ratios, betas, beta), min(1.0, 2 * step)
        else:
            step /= 2
        here = best + step * (aim - best)
        if np.abs(here - best).max() < _LEAST_STEP:
            break
    return best, at


def weights_of_rewards(
    rewards: ArrayLike, kl_coef: float, *, normalized: bool = True
) -> MixtureWeights:
    """lambda* of prompters that nobody has trained yet, each the optimum for a reward at kl_coef.

    rewards: [P, S, K] of what the reference wrote. normalized: whether a goal counts by its reward
    less kl_coef log E_ref exp(reward / kl_coef), which makes goals comparable (MPO), or by the
    reward itself. That is what ``implicit`` then holds, and ``kl_coef * value`` the least of it,
    less kl_coef times the KL, that the mixture reaches: the most that any prompter does.

    Of S samples it errs by order 1 / S. Z is estimated too low, and so the value of raw rewards.
    Normalized, each goal's own Z is too low as well, and by more: goals look better served than
    they are (at S = 1 each is 0), and the one whose rewards vary most gets too little weight.
    [derived]

    Raises ValueError for fewer than two goals, and as `maxmin_weights`.
    """
    values = np.asarray(rewards, float)
    if not kl_coef > 0:
        raise ValueError(f"kl_coef: expected a number above 0, got {kl_coef!r}")
    whole = values.ndim == 3 and values.size and values.shape[2] >= 2
    if not whole or not np.isfinite(values).all():
        raise ValueError(
            "rewards: expected finite numbers [prompts, samples, 2 or more goals], got shape "
            f"{values.shape}"
        )
    if normalized:
        values = values - optimum_objective(values.swapaxes(1, 2), kl_coef)[:, None, :]
    equal = np.full(values.shape[2], kl_coef)
    return maxmin_weights(values / kl_coef, np.zeros(values.shape[:2]), betas=equal, beta=kl_coef)


def _look(
    scaled: Floats, importance: Floats, weights: Floats
) -> tuple[float, Floats, Floats, Floats]:
    """F, its gradient [K] and Hessian [K, K], and the samples' probabilities [P, S]."""
    logs = importance + scaled @ weights
    top = logs.max(axis=1, keepdims=True)
    mass = np.exp(logs - top)
    total = mass.sum(axis=1, keepdims=True)
    value = float((top[:, 0] + np.log(total[:, 0] / logs.shape[1])).mean())
    probability = mass / total
    means = np.einsum("ps,psk->pk", probability, scaled)
    centred = scaled - means[:, None, :]
    hessian = np.einsum("ps,psk,psl->kl", probability, centred, centred, optimize=True)
    return value, means.mean(axis=0), hessian / len(logs), probability


def _minimise(scaled: Floats, importance: Floats) -> Floats:
    """lambda*, from log ratios that are small at first, and twice as large each time until they are
    whole: F has kinks where they are of many nats, at which Newton's method would stall."""
    spread = float(np.ptp(scaled, axis=1).max())
    weights = np.full(scaled.shape[2], 1.0 / scaled.shape[2])
    for halvings in range(math.ceil(math.log2(max(1.0, spread))), -1, -1):
        weights = _newton(scaled / 2.0**halvings, importance, weights)
    return weights


def _face_step(
    weights: Floats, active: NDArray[np.bool_], gradient: Floats, hessian: Floats
) -> Floats:
    """Newton's, towards derivatives that are equal on the face of the active weights, as far as the
    edge of the simplex; 0 where none leads there."""
    face = np.flatnonzero(active)
    size = len(face)
    system = np.ones((size + 1, size + 1))
    # A face on which F is flat has a minimum all the same.
    flat = 1e-12 * max(1.0, float(hessian.trace()))
    system[:size, :size] = hessian[np.ix_(face, face)] + flat * np.eye(size)
    system[size, size] = 0.0
    move = np.zeros(len(weights))
    move[face] = np.linalg.solve(system, np.append(-gradient[face], 0.0))[:size]
    if not (move < 0).any():
        return np.zeros(len(weights))
    reach = np.where(move < 0, -weights / np.where(move < 0, move, -1.0), np.inf)
    step: Floats = move * min(1.0, float(reach.min()))
    return step


def _newton(scaled: Floats, importance: Floats, weights: Floats) -> Floats:
    """On the face of the simplex that the weights lie in: a step that leaves the face stops at its
    edge; where the face has its minimum, what would pay to have weight joins."""
    active = weights > 0
    tolerance = _TOLERANCE * max(1.0, float(np.abs(scaled).max()))
    for _ in range(_STEPS):
        value, gradient, hessian, _ = _look(scaled, importance, weights)
        level = float(gradient @ weights)
        if float(np.abs(gradient[active] - level).max()) < tolerance:
            joining = int(np.argmin(np.where(active, np.inf, gradient)))
            if active.all() or gradient[joining] >= level - tolerance:
                break
            active[joining] = True
        move = _face_step(weights, active, gradient, hessian)
        if not move.any():
            break
        slope, length = float(gradient @ move), 1.0
        while length > 1e-14:
            there, down, _, _ = _look(scaled, importance, weights + length * move)
            # Of values that differ by less than their rounding, the slope still tells.
            if there <= value + 1e-4 * length * slope or float(down @ move) <= 0:
                break
            length /= 2
        weights = weights + length * move
        leaving = active & (weights <= 1e-15)
        weights[leaving], active = 0.0, active & ~leaving
        weights = weights / weights.sum()
    return weights
