"""What prompting can reach: the headroom before training, the bound against a tuned target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignpro.config.data import HELD_OUT, DataConfig
from alignpro.config.fields import Place, above, at_least, checked, only_default, require
from alignpro.config.model import check_local, target_of
from alignpro.config.prompting import StageConfig, check_untruncated

KL_COEFS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
# Log-probabilities are those of the untruncated distribution, so that is what is sampled.
_UNTRUNCATED = "the untruncated distribution is what is scored"


@dataclass(frozen=True)
@checked
class HeadroomConfig(StageConfig):
    """Rewrites of the untuned prompter, their responses and rewards, and a grid of kl_coef."""

    num_prompts: Annotated[int, at_least(2)] | None = 48
    """How many of the rows are used, the first ones, where there are so many; null is all."""
    num_rewrites: Annotated[int, at_least(2)] = 8
    """Rewrites a prompt; the KL that the samples can show is at most its logarithm."""
    num_responses: Annotated[int, at_least(1)] = 4
    """Responses to each rewrite; from 2 on, there are estimates that are freed of noise."""
    kl_coefs: tuple[Annotated[float, above(0)], ...] = KL_COEFS
    """The weights of the KL penalty that are looked at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_untruncated("rewrite", self.rewrite, _UNTRUNCATED)
        require("kl_coefs", self.kl_coefs, bool(self.kl_coefs), "at least one number")


@dataclass(frozen=True)
@checked
class BoundConfig(StageConfig):
    """The bound at one kl_coef, and the gap that is measured beside it."""

    trained: Place | None = None
    """The PEFT folder of a trained prompter; null leaves it out."""
    tuned: Place | None = None
    """The PEFT folder of the tuned target; null is the optimum in closed form, from the target's
    samples."""
    data: DataConfig = HELD_OUT
    reward_range: tuple[float, ...] | None = None
    """The least and the greatest reward, [low, high]; null is what was observed."""
    num_prompts: Annotated[int, at_least(2)] | None = 32
    """How many of the rows are used, the first ones, where there are so many; null is all."""
    num_rewrites: Annotated[int, at_least(2)] = 8
    """Rewrites a prompt."""
    num_responses: Annotated[int, at_least(1)] = 4
    """Responses to each rewrite; the raw prompt gets as many as all rewrites together."""
    kl_coef: Annotated[float, above(0)] = 0.05
    """The weight of the KL penalty."""
    tuned_kl_coef: Annotated[float, above(0)] | None = None
    """The weight of the KL penalty of the tuned target in closed form; null is kl_coef."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_untruncated("rewrite", self.rewrite, _UNTRUNCATED)
        check_untruncated("response", self.response, _UNTRUNCATED)
        target = target_of(self.prompter, self.target)
        if target.endpoint is not None:
            if self.tuned is not None:
                check_local("target", target, "an adapter of the target (tuned) is measured")
            given = self.response.temperature
            reason = "the log-probabilities that an endpoint tells are of temperature 1"
            require("response.temperature", given, given == 1, f"1 before an endpoint: {reason}")
        adapter = target.adapter
        require("target.adapter", adapter, adapter is None, "null: base weights are compared")
        if self.tuned is not None:
            only_default(self, "tuned_kl_coef", "without tuned: that target was tuned already")
        span = self.reward_range
        require(
            "reward_range",
            span,
            span is None or (len(span) == 2 and span[0] < span[1]),
            "[low, high] with low < high",
        )
