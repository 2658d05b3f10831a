"""Training on preferences, and fitting a reward to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from alignpro.config.anchor import AnchorConfig
from alignpro.config.data import PreferencesConfig
from alignpro.config.fields import (
    Date,
    Place,
    Range,
    Seed,
    Threads,
    above,
    at_least,
    checked,
    require,
)
from alignpro.config.held_out import HeldOutConfig
from alignpro.config.model import PROMPTER, ModelConfig, check_local, check_policy, trained_of
from alignpro.config.prompting import PairsFitConfig, Prompting, check_tuner


@dataclass(frozen=True)
@checked
class HeldOutPairsConfig(HeldOutConfig):
    """Pairs that are not trained on, measured as the training goes on."""

    data: PreferencesConfig = field(
        default_factory=lambda: PreferencesConfig(path=None, split="validation")
    )
    """The pairs to measure; one whose prompt is trained on as well is refused."""
    num_prompts: Annotated[int, at_least(2)] | None = 64
    """How many of them are drawn, where there are so many; null is all."""


@dataclass(frozen=True)
@checked
class HeldOutPreferencesConfig(PreferencesConfig):
    """Pairs that nothing is fitted to."""

    path: Place | None = None
    """A file, a packaged name, or a hub name; null is the data's own."""
    split: str | None = "heldout"
    """The rows to use, by their column "split"; null is all rows."""


@dataclass(frozen=True)
@checked
class RewardFitConfig:
    """A reward from preferences: a linear head on a frozen model's states (Bradley-Terry)."""

    model: ModelConfig = PROMPTER
    """The frozen model that reads prompt and answer."""
    data: PreferencesConfig = field(default_factory=PreferencesConfig)
    """The pairs of answers."""
    heldout: HeldOutPreferencesConfig | None = None
    """The pairs that the reward is measured on ({} takes the split heldout); null holds some out.

    Pairs of the data whose conversation begins as one of them does are left out of the fit.
    """
    state: Literal["mean", "end"] = "mean"
    """The state that is read: the mean over the answer's tokens, or that at the token that ends it.
    """
    held_out_share: Annotated[float, Range(lambda v: 0 < v < 1, "between 0 and 1")] = 0.2
    """The share of the conversations that is held out where heldout is null."""
    folds: Annotated[int, at_least(2)] = 5
    """The parts of the other conversations that choose the strength by cross-validation."""
    strengths: tuple[Annotated[float, above(0)], ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """The strengths of the penalty on the weights that are tried."""
    on_too_long: Literal["error", "skip"] = "error"
    """What becomes of a pair that the model's context does not hold: an error, or its row left out.

    None is cut: a conversation that begins otherwise would count as another one.
    """
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's, which the reward
    records."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    def __post_init__(self) -> None:
        require("data.path", self.data.path, self.data.path is not None, "a source")
        check_local("model", self.model, "its states are read in this process")
        adapter, strengths = self.model.adapter, self.strengths
        require("model.adapter", adapter, adapter is None, "null: the states are the base model's")
        require("strengths", strengths, bool(strengths), "at least one")


@dataclass(frozen=True)
@checked
class PairLossConfig:
    """The loss of pairs of which one is preferred (DPO)."""

    beta: Annotated[float, above(0)] = 0.1
    """The weight of the KL penalty that the loss stands for: a smaller one lets the policy go
    further from the reference."""
    label_smoothing: Annotated[float, Range(lambda v: 0 <= v < 0.5, "at least 0 and below 0.5")] = (
        0.0
    )
    """The share of pairs that are taken to be the wrong way round."""
    chosen_nll: Annotated[float, at_least(0)] = 0.0
    """The weight of the chosen answers' negative log-likelihood per token, added to the loss.

    The loss of pairs is content where both answers become less likely, the rejected one faster;
    this holds the chosen one up.
    """


@dataclass(frozen=True)
@checked
class PreferConfig(PairsFitConfig, PairLossConfig):
    """Preference training: raises the chosen answers above the rejected ones (DPO)."""

    policy: Literal["prompter", "target"] = "prompter"
    """What is trained: the prompter on pairs of rewrites, or the target on pairs of answers.

    prompter: it reads prompts in prompting.template, as it does when it rewrites. target: it reads
    them as they are, and no prompter takes part.
    """
    prompter: ModelConfig = PROMPTER
    """The model that rewrites prompts; its adapter is where its training starts, and the reference.
    """
    target: ModelConfig | None = None
    """The model that answers; null is the base weights of the prompter.

    With policy prompter it is not loaded: it is whom the rewrites are for, in an evaluation of the
    run.
    """
    data: PreferencesConfig = field(default_factory=PreferencesConfig)
    """The pairs of answers."""
    heldout: HeldOutPairsConfig | None = None
    """Pairs to measure while training ({} takes the defaults); null measures none."""
    run_dir: Place = "alignpro-prefer"
    """The directory of the run."""
    anchor: AnchorConfig | None = None
    """Pairs behind whose prompt the reference reads another one ({} takes the defaults); null
    anchors none (E-DPO).

    The first step's margin is then not 0.
    """
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""

    def __post_init__(self) -> None:
        check_tuner(self)
        require("data.path", self.data.path, self.data.path is not None, "a source")
        check_policy(self.policy, self.prompter, self.target)

    @property
    def trained(self) -> ModelConfig:
        """The model that is trained; its adapter is where training starts, and the reference."""
        return trained_of(self.policy, self.prompter, self.target)
