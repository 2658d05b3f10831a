"""One prompter from a mixture of several: the mixture as the reward of a closed-form fit.

The mixture ``rho* ~ prod_k rho_k^w_k``, whose weights sum to 1, is the optimum of the reward
``sum_k w_k log rho_k - log rho_ref`` at kl_coef 1, whatever the reference (at another one, of a
mixture that goes 1 / kl_coef as far from it). That reward is known of every rewrite, without a
target and without noise, so the fit to the reference's rollouts is that of any other reward
(`train.closed_form`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import fingerprints
from alignpro.config import (
    ClosedFormConfig,
    DataConfig,
    PreferConfig,
    PreferencesConfig,
    TrainConfig,
)
from alignpro.data.files import DataError
from alignpro.data.load import load_prompts
from alignpro.models.adapter_files import MIXTURE, is_mixture
from alignpro.models.answer_scores import sequence_logprobs
from alignpro.models.mixture import BASE, Mixture, load_writer
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.types import Prompt, Response, Rewrite, Rollout


class MixtureReward:
    """The reward of rewrites that the reference wrote. folder: of a mixture.

    Raises ValueError for none, and as `read_mixture`.
    """

    def __init__(self, folder: Path, model: NativeModel) -> None:
        if not is_mixture(folder):
            raise ValueError(
                f"closed_form.mixture: {folder / MIXTURE}: no such file; alignpro mix writes one"
            )
        mixture = load_writer(model, folder)
        assert isinstance(mixture, Mixture)
        self.made_from = {"mixture": fingerprints.of_adapter(mixture)}
        self._model = model
        self._members = [
            (None if member == BASE else model.make_adapter(member), weight)
            for member, weight in mixture.members
            if weight != 0.0
        ]

    def rollout(
        self, pipeline: Pipeline, prompts: Sequence[Prompt], num_rewrites: int, seed: int
    ) -> Rollout:
        """Rewrites by the pipeline's prompter, which is the reference. Where a target's response
        would be, each has an empty one with the reward: no target is asked."""
        alone = pipeline.without_target()
        groups = alone.rewrite(prompts, num_rewrites=num_rewrites, seed=seed)
        flat = [w for group in groups for w in group]
        rewards = iter(self.of(flat, pipeline.rewrite_params.temperature))
        scored = [
            [replace(w, responses=[Response([], "", [], "stop", next(rewards))]) for w in group]
            for group in groups
        ]
        return Rollout(list(prompts), scored, {}, sum(len(w.tokens) for w in flat))

    def of(self, rewrites: Sequence[Rewrite], temperature: float) -> list[float]:
        """sum_k w_k log rho_k - log rho_ref of whole rewrites, in nats."""
        read, written = [w.prompter_tokens for w in rewrites], [w.tokens for w in rewrites]
        rewards = -np.array([math.fsum(w.logprobs) for w in rewrites])
        for member, weight in self._members:
            own = sequence_logprobs(self._model, read, written, temperature, member)
            rewards += weight * np.array(own)
        return [float(reward) for reward in rewards]


def distill_config(
    folder: Path, runs: Mapping[Path, TrainConfig | PreferConfig], **changes: Any
) -> TrainConfig:
    """The training of one prompter from the mixture in a folder, into its ``distilled``: models,
    prompts and prompting of the first of the runs that it was made of, and the sampling of the
    first that drew rewrites. changes: other fields of the configuration.

    Raises ValueError, which names the run, for pairs without a column of prompts.
    """
    run, first = next(iter(runs.items()))
    reference = run / "reference"
    adapter = str(reference) if reference.exists() else None
    shared = ("target", "data", "on_too_long", "prompting", "lora", "date", "threads")
    of_run = {name: getattr(first, name) for name in shared}
    if isinstance(first, TrainConfig):
        of_run |= {"reward": first.reward, "response": first.response}
    else:
        of_run["data"] = _prompts_of_pairs(run, first.data)
    by_reward = (config for config in runs.values() if isinstance(config, TrainConfig))
    of_mixture = {
        "prompter": replace(first.prompter, adapter=adapter),
        "run_dir": str(folder / "distilled"),
        "algorithm": "closed_form",
        "closed_form": ClosedFormConfig(mixture=str(folder)),
        "rewrite": next(by_reward, first).rewrite,
        "kl_coef": 1.0,
        "lr_schedule": "linear",
    }
    return TrainConfig(**{**of_run, **of_mixture, **changes})


def _prompts_of_pairs(run: Path, pairs: PreferencesConfig) -> DataConfig:
    prompts = DataConfig(**{f.name: getattr(pairs, f.name) for f in fields(DataConfig)})
    try:
        load_prompts(prompts)
    except DataError as error:
        raise ValueError(
            f"{run}: its pairs have no prompts of their own to distil a mixture on ({error}); name "
            "a run by a reward first, or give the pairs a column of prompts"
        ) from None
    return prompts
