"""How tight the leash is: kl_coef steered to a KL."""

from __future__ import annotations

import math

ERROR_LIMIT = 0.2  # of Ziegler et al.: one odd batch moves kl_coef by no more than gain * this


def steer_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """``kl_coef * exp(gain * clip(kl / target - 1, -0.2, 0.2))``.

    The proportional controller in log space of Ziegler et al. 2019 (arXiv 1909.08593; there
    ``1 + x`` stands for ``exp(x)``, and gain is 0.1). kl, target: nats per rewrite. Raises
    ValueError for numbers that are not finite, or not above 0 where they must be.
    """
    for name, value in (("kl_coef", kl_coef), ("target", target), ("gain", gain)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if not math.isfinite(kl):
        raise ValueError(f"kl: expected a finite number, got {kl}")
    error = min(max(kl / target - 1.0, -ERROR_LIMIT), ERROR_LIMIT)
    return kl_coef * math.exp(gain * error)
