"""What prompting can reach: the headroom before training, the bound against a tuned target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignpro.config.fields import Seed, Threads, above, at_least, checked, only_default, require
from alignpro.config.model import (
    PROMPTER,
    PROMPTER_HERE,
    ModelConfig,
    check_local,
    target_of,
)
from alignpro.config.prompting import (
    RESPONSE,
    REWRITE,
    Prompting,
    check_sampling,
    check_untruncated,
)
from alignpro.types import SamplingParams

KL_COEFS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
# Log-probabilities are those of the untruncated distribution, so that is what is sampled.
_UNTRUNCATED = "the untruncated distribution is what is scored"


@dataclass(frozen=True)
@checked
class HeadroomConfig:
    """Rewrites of the untuned prompter, their responses and rewards, and a grid of kl_coef."""

    prompter: ModelConfig = PROMPTER  # its adapter: the untuned prompter's, None: the base model
    target: ModelConfig | None = None  # frozen; None: the prompter's base weights
    data: str = "everyday"
    split: str | None = "train"
    reward: str = "vader+0.2*topic"
    seed: Seed = 0
    num_prompts: Annotated[int, at_least(2)] | None = 48  # the first so many rows; None: all
    # N: the KL that the samples can show is at most log N.
    num_rewrites: Annotated[int, at_least(2)] = 8
    # M; from 2 on, the estimates that are freed of noise.
    num_responses: Annotated[int, at_least(1)] = 4
    rewrite: SamplingParams = REWRITE  # the untruncated distribution, as in training
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    kl_coefs: tuple[Annotated[float, above(0)], ...] = KL_COEFS
    threads: Threads = None

    def __post_init__(self) -> None:
        _check_samples(self)
        require("kl_coefs", self.kl_coefs, bool(self.kl_coefs), "at least one number")


@dataclass(frozen=True)
@checked
class BoundConfig:
    """The bound at one kl_coef, and the gap that is measured beside it."""

    prompter: ModelConfig = PROMPTER  # its adapter: the untuned prompter's, None: the base model
    trained: str | None = None  # PEFT folder of a trained prompter; None: not measured
    target: ModelConfig | None = None  # frozen; None: the prompter's base weights
    # PEFT folder of the tuned target; None: the optimum in closed form, from the target's samples.
    tuned: str | None = None
    data: str = "everyday"
    split: str | None = "heldout"
    reward: str = "vader+0.2*topic"
    reward_range: tuple[float, ...] | None = None  # [low, high]; None: what was observed
    seed: Seed = 0
    num_prompts: Annotated[int, at_least(2)] | None = 32  # the first so many rows; None: all
    num_rewrites: Annotated[int, at_least(2)] = 8  # N
    num_responses: Annotated[int, at_least(1)] = 4  # M; the raw prompt gets N x M
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    kl_coef: Annotated[float, above(0)] = 0.05
    # Of the closed-form tuned target; None: kl_coef.
    tuned_kl_coef: Annotated[float, above(0)] | None = None
    threads: Threads = None

    def __post_init__(self) -> None:
        _check_samples(self)
        check_untruncated("response", self.response, _UNTRUNCATED)
        target = target_of(self.prompter, self.target)
        reason = "its log-probabilities of given text are compared, which endpoints do not tell"
        check_local("target", target, reason)
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


def _check_samples(config: HeadroomConfig | BoundConfig) -> None:
    check_sampling("rewrite", config.rewrite)
    check_sampling("response", config.response)
    check_untruncated("rewrite", config.rewrite, _UNTRUNCATED)
    check_local("prompter", config.prompter, PROMPTER_HERE)
