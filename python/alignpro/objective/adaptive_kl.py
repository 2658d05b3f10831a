"""The coefficient of the KL penalty, steered to a KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

ERROR_LIMIT = 0.2  # of Ziegler et al.: one odd batch moves kl_coef by no more than gain * this


@dataclass(frozen=True)
class AdaptiveKLController:
    """The proportional controller in log space of Ziegler et al. 2019 (arXiv 1909.08593; there
    ``1 + x`` stands for ``exp(x)``, and gain is 0.1). target: nats per rewrite.
    """

    target: float
    gain: float = 0.1

    def __post_init__(self) -> None:
        _check_positive("target", self.target)
        _check_positive("gain", self.gain)

    def update(self, kl_coef: float, kl: float) -> float:
        """``kl_coef * exp(gain * clip(kl / target - 1, -0.2, 0.2))``. kl: nats per rewrite.

        Raises ValueError for numbers that are not finite, or not above 0 where they must be.
        """
        _check_positive("kl_coef", kl_coef)
        if not math.isfinite(kl):
            raise ValueError(f"kl: expected a finite number, got {kl}")
        error = min(max(kl / self.target - 1.0, -ERROR_LIMIT), ERROR_LIMIT)
        return kl_coef * math.exp(self.gain * error)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
