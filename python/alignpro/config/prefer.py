"""Training on preferences, and fitting a reward to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from alignpro.config.data import PreferencesConfig
from alignpro.config.fields import Range, above, at_least, checked, require
from alignpro.config.held_out import HeldOutConfig
from alignpro.config.model import PROMPTER, ModelConfig, check_trainable, target_of
from alignpro.config.prompting import PairsFitConfig, Prompting


@dataclass(frozen=True)
@checked
class HeldOutPairsConfig(HeldOutConfig):
    """Pairs that are not trained on, measured as the training goes on."""

    data: PreferencesConfig = field(
        default_factory=lambda: PreferencesConfig(path=None, split="validation")
    )
    """The pairs to measure; one whose prompt is trained on as well is refused."""
    num_prompts: Annotated[int, at_least(2)] | None = 64
    """How many of them are drawn; null is all."""


@dataclass(frozen=True)
@checked
class PreferConfig(PairsFitConfig):
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
    run_dir: str = "alignpro-prefer"
    """The directory of the run."""
    learning_rate: Annotated[float, above(0)] = 1e-4
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
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""

    def __post_init__(self) -> None:
        require("data.path", self.data.path, self.data.path is not None, "a source")
        if self.policy == "target":
            adapter = self.prompter.adapter
            require("prompter.adapter", adapter, adapter is None, "null: target.adapter is tuned")
        check_trainable(
            "target" if self.target and self.policy == "target" else "prompter", self.trained
        )

    @property
    def trained(self) -> ModelConfig:
        """The model that is trained; its adapter is where training starts, and the reference."""
        tunes_target = self.policy == "target"
        return target_of(self.prompter, self.target) if tunes_target else self.prompter
