"""One prompter from a mixture of several: the mixture as the reward of a closed-form fit.

The mixture ``rho* ~ rho_ref prod_k (rho_k / rho_ref)^e_k`` of `alignpro mix` is the optimum of the
reward ``sum_k e_k log(rho_k / rho_ref)`` at kl_coef 1 (at another one, of a mixture that goes 1 /
kl_coef as far). That reward is known of every rewrite, without a target and without noise, so the
fit to the reference's rollouts is that of any other reward (`train.closed_form`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import fingerprints
from alignpro.config import ClosedFormConfig, TrainConfig
from alignpro.models.adapter_files import MIXTURE
from alignpro.models.answer_scores import sequence_logprobs
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.run_directory import config_of_run, read_record
from alignpro.train.policy import Reference
from alignpro.types import Prompt, Response, Rewrite, Rollout


class MixtureReward:
    """The reward of rewrites that the reference wrote.

    folder: what `alignpro mix` wrote. reference: what training begins with.

    Raises:
        FileNotFoundError: no mixture, or no run of it.
        ValueError: a mixture of prompters that began as another one.
    """

    def __init__(self, folder: Path, model: NativeModel, reference: Reference) -> None:
        self._model = model
        exponents = read_exponents(folder)
        began = None if reference == "base" else fingerprints.of_adapter(reference).hash
        for run in map(Path, exponents):
            kept = run / "reference"
            before = None
            if kept.exists():
                before = fingerprints.of_adapter(model.load_adapter(kept)).hash
            if before != began:
                raise ValueError(
                    f"closed_form.mixture: {run} began with another untuned prompter than this "
                    f"training; expected prompter.adapter={kept if before else 'null'}"
                )
        weights = {run: model.load_adapter(Path(run) / "adapter") for run in exponents}
        self.made_from = {
            f"adapter of {run}": fingerprints.of_adapter(adapter)
            for run, adapter in weights.items()
        }
        self._parts = [(model.make_adapter(weights[run]), e) for run, e in exponents.items()]

    def rollout(
        self, pipeline: Pipeline, prompts: Sequence[Prompt], num_rewrites: int, seed: int
    ) -> Rollout:
        """Rewrites by the pipeline's prompter, which is the reference. Where a target's response
        would be, each has an empty one with the reward: no target is asked."""
        groups = pipeline.rewrite(prompts, num_rewrites=num_rewrites, seed=seed)
        flat = [w for group in groups for w in group]
        rewards = iter(self.of(flat, pipeline.rewrite_params.temperature))
        scored = [
            [replace(w, responses=[Response([], "", [], "stop", next(rewards))]) for w in group]
            for group in groups
        ]
        return Rollout(list(prompts), scored, {}, sum(len(w.tokens) for w in flat))

    def of(self, rewrites: Sequence[Rewrite], temperature: float) -> list[float]:
        """sum_k e_k log(rho_k / rho_ref) of whole rewrites, in nats."""
        read, written = [w.prompter_tokens for w in rewrites], [w.tokens for w in rewrites]
        recorded = np.array([math.fsum(w.logprobs) for w in rewrites])
        rewards = np.zeros(len(rewrites))
        for adapter, exponent in self._parts:
            own = sequence_logprobs(self._model, read, written, temperature, adapter)
            rewards += exponent * (np.array(own) - recorded)
        return [float(reward) for reward in rewards]


def read_exponents(folder: Path) -> dict[str, float]:
    """By run, from what `alignpro mix` wrote to a folder. Raises FileNotFoundError, ValueError."""
    path = folder / MIXTURE
    if not path.is_file():
        raise FileNotFoundError(
            f"closed_form.mixture: {path}: no such file; expected one by alignpro mix"
        )
    goals = read_record(path).get("goals")
    if not isinstance(goals, Mapping) or not goals:
        raise ValueError(f"closed_form.mixture: {path}: expected goals by run, got {goals!r}")
    exponents = {str(run): float(goal["exponent"]) for run, goal in goals.items()}
    for run in exponents:
        if not (Path(run) / "adapter").is_dir():
            raise FileNotFoundError(f"closed_form.mixture: {run}: no run with an adapter")
    return {run: exponent for run, exponent in exponents.items() if exponent != 0.0}


def distill_config(folder: Path, **changes: Any) -> TrainConfig:
    """The training of one prompter from the mixture in a folder, into its ``distilled``: models,
    prompts and prompting of its first run. changes: other fields of the configuration."""
    runs = [Path(run) for run in read_exponents(folder)]
    config = config_of_run(runs[0])
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{runs[0]}: expected the training of a prompter")
    reference = runs[0] / "reference"
    adapter = str(reference) if reference.exists() else None
    shared = (
        *("target", "data", "on_too_long", "reward", "rewrite", "response", "prompting"),
        *("lora", "date", "threads"),
    )
    of_run = {name: getattr(config, name) for name in shared}
    of_mixture = {
        "prompter": replace(config.prompter, adapter=adapter),
        "run_dir": str(folder / "distilled"),
        "algorithm": "closed_form",
        "closed_form": ClosedFormConfig(mixture=str(folder)),
        "kl_coef": 1.0,
        "lr_schedule": "linear",
    }
    return TrainConfig(**{**of_run, **of_mixture, **changes})
