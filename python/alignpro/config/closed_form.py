"""The closed-form fit: what ``algorithm: closed_form`` reads beside the rest of `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from alignpro.config.fields import at_least, checked


@dataclass(frozen=True)
@checked
class ClosedFormConfig:
    """One set of rollouts of the untuned prompter, and the fit to them.

    ``num_rewrites`` and ``num_responses`` of `TrainConfig` shape the rollouts; each of ``steps``
    steps reads ``prompts_per_step`` of the prompts with all their rewrites, pass after pass. Two
    passes are about right: more of them fit the noise (docs/notes/closed-form.md).
    """

    # Prompts rolled out, once each; None: all there are.
    num_prompts: Annotated[int, at_least(1)] | None = None
    # Both are least at the optimum. variance: of reward - kl_coef * log ratio within a prompt.
    # likelihood: weighted by exp(reward / kl_coef), as the formula says; of a few noisy rewrites
    # it takes the best one and no more (seed 0 of docs/notes/closed-form.md: +0.05 of reward where
    # variance gains +0.18).
    loss: Literal["variance", "likelihood"] = "variance"
