"""Several trained prompters as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from alignpro.config.data import DataConfig
from alignpro.config.fields import Place, Seed, Threads, above, at_least, checked, require


@dataclass(frozen=True)
@checked
class MixConfig:
    """The mixture of prompters that serves the worst-off of their goals best (MPO)."""

    runs: tuple[Place, ...] = ()
    """The runs of the prompters, trained from one untuned prompter, each for its goal; one alone
    is mixed with the untuned prompter, as if trained with another kl_coef."""
    data: DataConfig | None = None
    """Prompts that the weights are found on; null is what the first run was trained on."""
    num_prompts: Annotated[int, at_least(1)] | None = 48
    """How many of the rows are used, the first ones, where there are so many; null is all."""
    num_rewrites: Annotated[int, at_least(2)] = 8
    """Rewrites a prompt that each prompter writes; no target is asked."""
    kl_coef: Annotated[float, above(0)] | None = None
    """The weight of the mixture's KL penalty; null is the mean of what the runs had."""
    sampling: Literal["token", "sequence"] = "token"
    """How the mixture draws: token by token, or whole rewrites exactly, by rejection."""
    weights: Literal["drawn", "whole"] | None = None
    """Of what the goals are served best: of what is drawn token by token, or of the mixture of
    whole rewrites (MPO's lambda*); null follows sampling, and is whole for what is distilled."""
    tries: Annotated[int, at_least(1)] = 32
    """Most draws of a rewrite with sampling sequence; the likeliest is taken then."""
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    def __post_init__(self) -> None:
        if self.weights == "drawn" and self.sampling == "sequence":
            raise ValueError("weights: drawn is for sampling token; sequence draws whole rewrites")
        enough = len(self.runs) >= 2 or (len(self.runs) == 1 and self.kl_coef is not None)
        expected = "two or more, each once, or one and a kl_coef"
        places = {Path(run).resolve() for run in self.runs}
        require("runs", list(self.runs), enough and len(places) == len(self.runs), expected)
