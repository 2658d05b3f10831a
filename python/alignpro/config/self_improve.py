"""Self-improvement: pairs that a policy makes of its own answers, with a calibrator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from alignpro.config.data import DataConfig
from alignpro.config.fields import Place, Range, RewardName, Seed, above, at_least, checked, require
from alignpro.config.model import PROMPTER, ModelConfig, check_policy, trained_of
from alignpro.config.prefer import PairLossConfig
from alignpro.config.prompting import (
    PairsFitConfig,
    Prompting,
    check_sampling,
    check_tuner,
    check_untruncated,
)
from alignpro.types import SamplingParams

_SCENES = DataConfig("scenes")
_RESPONSE = SamplingParams(max_new_tokens=80, temperature=0.7)
_SHARE = Range(lambda v: 0 <= v <= 1, "from 0 to 1")


@dataclass(frozen=True)
@checked
class MeasureConfig:
    """The prompts that the policy of every round answers, for the report."""

    data: DataConfig | None = None
    """Where they come from; null is the data of the run, and a group without a path another split
    of them."""
    num_prompts: Annotated[int, at_least(2)] | None = 32
    """How many of them are used, the first ones; null is all."""


@dataclass(frozen=True)
@checked
class SelfImproveConfig(PairsFitConfig):
    """Self-improvement: rounds of training on pairs that the policy makes of its own answers."""

    policy: Literal["target", "prompter"] = "target"
    """What is trained: the target on its answers, or the prompter on its rewrites.

    target: candidates are sentences that go on with an answer, and no prompter takes part.
    prompter: candidates are rewrites; the confidence is the target's in its answer to one.
    """
    prompter: ModelConfig = PROMPTER
    """The model that rewrites prompts, with policy prompter."""
    target: ModelConfig | None = None
    """The model that answers; null is the base weights of the prompter."""
    data: DataConfig = _SCENES
    """The prompts; a column "source" says what answers are to be faithful to."""
    num_prompts: Annotated[int, at_least(1)] | None = None
    """How many of the rows make pairs in a round, the first ones; null is all."""
    measured: MeasureConfig = field(default_factory=MeasureConfig)
    """The prompts that every round is measured on; nothing is chosen by them."""
    run_dir: Place = "alignpro-self-improve"
    """The directory of the run; each round has one of its own in it."""

    # The candidates.
    iterations: Annotated[int, at_least(1)] = 3
    """Rounds of candidates and training."""
    candidates: Annotated[int, at_least(2)] = 5
    """Sentences that may go on with an answer, or rewrites of a prompt, of which the best and the
    worst make a pair."""
    keep: tuple[Annotated[int, at_least(1)], ...] = (1, 1)
    """How many answers go on behind a sentence: the best ones, and the worst ones."""
    sentences: Annotated[int, at_least(1)] = 3
    """The most sentences of an answer that is searched."""
    calibrator: RewardName = "grounding"
    """The reward that calibrates the self-reward: any, as of `reward` in training.

    With policy target it is given each sentence as a response.
    """
    calibration: Annotated[float, _SHARE] = 0.9
    """The calibrator's share of a candidate's score; 0 is self-rewarding alone, 1 the calibrator
    alone.

    By ranks, the confidence decides between equals alone where this is above (candidates - 1) /
    candidates, as 0.9 is of five.
    """
    scale: Literal["rank", "z", "raw"] = "rank"
    """How the two are made comparable: by their ranks among the candidates, by their deviations,
    or not at all.

    raw is the sum of the paper, in which the larger scale decides whatever the share.
    """

    # The training.
    preference: PairLossConfig = field(default_factory=PairLossConfig)
    """The loss of the pairs; T rounds of it with reference previous amount to beta / T."""
    reference: Literal["previous", "first"] = "previous"
    """The policy that a round is held to: that of the round before, or the first one."""
    response: SamplingParams = _RESPONSE
    """How the target is sampled; max_new_tokens are those of a whole answer."""
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""
    steps: Annotated[int, at_least(1)] = 12
    """The most steps of training in a round."""
    epochs: Annotated[int, at_least(1)] = 3
    """The most passes over a round's pairs.

    Candidates come to agree, and the same steps on the few pairs that are left overshoot.
    """
    seed: Seed = 0
    learning_rate: Annotated[float, above(0)] = 1e-4

    def __post_init__(self) -> None:
        require("tuner", self.tuner, self.tuner == "lora", "lora: rounds train LoRA matrices")
        check_tuner(self)
        require("data.path", self.data.path, self.data.path is not None, "a source")
        require("keep", list(self.keep), len(self.keep) == 2, "two numbers: of best and of worst")
        check_sampling("response", self.response)
        reason = "confidence is the log-probability of what is drawn"
        check_untruncated("response", self.response, reason)
        stops = (*self.response.stop, *self.response.stop_token_ids)
        require("response.stop", stops, not stops, "none: sentences are told apart by themselves")
        check_policy(self.policy, self.prompter, self.target)

    @property
    def trained(self) -> ModelConfig:
        """The model that is trained; its adapter is the first policy."""
        return trained_of(self.policy, self.prompter, self.target)
