"""A look at prompts that are not trained on, while the training goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alignpro.config import PreferConfig, TrainConfig
from alignpro.config.fields import count_of
from alignpro.data.load import PromptRow, stack_columns
from alignpro.findings import (
    ONE_REWRITE,
    Finding,
    Measured,
    arm_findings,
    equal_rewards,
    measure,
    one_rewrite,
    reasoning_alone,
)
from alignpro.lengths import Row
from alignpro.models.adapter import AdapterWeights
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import score_rollout

_HELD_OUT = 1 << 33  # a stream of randomness beside those of the steps


def load_held_out(
    config: TrainConfig | PreferConfig,
    trained_on: Sequence[Row],
    load: Callable[[Any], Sequence[Row]],
) -> list[Row]:
    """The rows that ``config.heldout`` names, drawn by the run's seed since files come sorted by
    kind; none without it.

    load: reads the rows of a group such as the configuration's ``data``.

    Raises:
        ValueError: fewer than asked for, or a prompt that is trained on.
    """
    options = config.heldout
    if options is None:
        return []
    source = options.data.of(config.data)
    rows = load(source)
    count = count_of(options, len(rows), source.path, "heldout.")
    shared = {row.prompt for row in rows} & {row.prompt for row in trained_on}
    if shared:
        raise ValueError(
            f"heldout: {len(shared)} of the {len(rows)} prompts ({source.path}, split "
            f"{source.split}) are trained on; set heldout.data to others"
        )
    return random.Random(config.seed).sample(rows, count)


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether a step is one before which is looked: the first, every so many, and the last."""
    return step % every == 0 or step == steps - 1


class HeldOut:
    """The same draws for the same prompts at every look, so that two looks differ by the policy."""

    def __init__(self, config: TrainConfig, rows: Sequence[PromptRow]) -> None:
        assert config.heldout is not None
        self._config, self._every = config, config.heldout.every
        self._prompts, self._columns = [row.prompt for row in rows], stack_columns(rows)
        self._before: Measured | None = None  # the first look's: the policy that training began as

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the first look from the metrics of the run that is resumed."""
        seen = [row["heldout"] for row in rows if "heldout" in row]
        if seen:
            fields = Measured.__dataclass_fields__
            self._before = Measured(**{name: seen[0][name] for name in fields if name in seen[0]})

    def look(self, pipeline: Pipeline, adapter: AdapterWeights | Any, step: int) -> dict[str, Any]:
        """What a step's row says of it: "heldout" and "warnings"; nothing where no look is due.

        Raises: as `Pipeline.rollout`.
        """
        config = self._config
        if not is_due(self._every, step, config.steps):
            return {}
        started = time.perf_counter()
        assert pipeline.reward is not None
        seed, unscored = derive_seed(config.seed, _HELD_OUT), pipeline.without_reward()
        prompter = config.policy == "prompter"
        if prompter:
            rollout = unscored.with_adapter(adapter).rollout(self._prompts, seed=seed)
        else:
            rollout = unscored.with_target_adapter(adapter).respond(self._prompts, seed=seed)
        rollout, rewards, components, paid = score_rollout(pipeline.reward, rollout, self._columns)
        given = [reward for (reward,) in filter(None, rewards)]
        if not given:
            return {"warnings": {"unscored": "The reward gave no held-out response a score."}}
        measured = measure(
            rollout,
            components,
            paid,
            adds=prompter,
            prompting=config.prompting,
            count_tokens=lambda text: 0,  # a prompter wrote them all
            answers=self._columns.get("answer"),
        )
        if self._before is None:
            self._before = measured
        before = {"untuned prompter" if prompter else "frozen target": self._before}
        found = arm_findings(measured, before, "prompter" if prompter else "tuned target")
        return {
            "heldout": {
                "reward_mean": sum(given) / len(given),
                **vars(measured),
                "seconds": time.perf_counter() - started,
            },
            "warnings": _by_rule(found, "On held-out prompts: "),
        }


def step_warnings(row: Mapping[str, Any]) -> dict[str, str]:
    """What to doubt in a step's own rewrites."""
    common = row.get("common_rewrite")
    found = []
    if common is not None and common > ONE_REWRITE:
        found.append(one_rewrite(common, "the rewrites of this step"))
    if row["reward_variance"] == 0.0:
        found.append(equal_rewards(row["truncated_responses"], row["scored_responses"]))
    if row["unscored_responses"]:
        count = row["unscored_responses"]
        found.append(
            Finding(
                "unscored",
                f"The reward gave {count} responses of a step no score (None): they are left out.",
            )
        )
    if row.get("reasoning_alone"):
        found.append(reasoning_alone(row["reasoning_alone"]))
    return _by_rule(found)


def _by_rule(findings: Iterable[Finding], where: str = "") -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in findings:  # a rule may find more than one thing
        texts[key] = f"{texts[key]} {text}" if key in texts else where + text
    return texts
