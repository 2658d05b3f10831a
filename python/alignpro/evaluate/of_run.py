"""What a run says of an evaluation, a headroom or a bound of it, and what is another one there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from alignpro import fingerprints
from alignpro.config import (
    EvalConfig,
    ModelConfig,
    PreferConfig,
    SelfImproveConfig,
    SftConfig,
    StageConfig,
    TrainConfig,
    to_mapping,
    unchecked,
)
from alignpro.data.load import PromptRow
from alignpro.fingerprints import Fingerprints
from alignpro.models.adapter import AdapterWeights
from alignpro.models.mixture import Mixture
from alignpro.run_directory import (
    CONFIG,
    MARKER,
    RunConfig,
    command_of,
    config_of_run,
    is_run_dir,
    run_around,
)

EVALUATE = "evaluate.json"  # in a run: what an evaluation of it asks for beside what the run says
# Both models, how they are put together and drawn, what is paid for, and which day it is.
_OF_RUN = (
    *("prompter", "target", "prompting", "rewrite", "response", "reward", "date"),
    *("data", "seed", "kl_coef"),
)
_FREE = ("data", "seed")  # another one is another measurement of the same thing
_log = logging.getLogger(__name__)
Stage = TypeVar("Stage", bound=StageConfig)


def settings_of_run(cls: type[Stage], run: str | Path) -> Stage:
    """The stage's configuration as the run has it, for `from_mapping` to start from.

    The untuned prompter is where training started; ``trained``, ``tuned`` or ``soft``, where the
    stage has them, is what came of it. A warm start is an untuned prompter itself.

    Raises:
        FileNotFoundError: no run, or one that is not done. ValueError: a damaged config.json.
    """
    run = Path(run)
    if not is_run_dir(run):
        problem = f"no {MARKER} in it" if run.is_dir() else "no such folder"
        raise FileNotFoundError(f"--run {run}: expected the directory of a run ({problem})")
    config = config_of_run(run)
    values = _values_of_stage(cls, run, config)
    if isinstance(config, SftConfig):
        values["prompter"] = replace(config.prompter, adapter=_adapter(run, command_of(SftConfig)))
    else:
        arms = {f.name for f in fields(cls)}
        came = "tuned" if config.policy == "target" else "trained"
        if came == "tuned" and config.tuner == "soft_prompt" and "soft" in arms:
            came = "soft"
        if came in arms:
            values[came] = _adapter(run, command_of(type(config)))
    return unchecked(cls, values)


def _values_of_stage(cls: type[StageConfig], run: Path, config: RunConfig) -> dict[str, Any]:
    """Of a stage's configuration what does not wait for the run to be done."""
    values = _values_of(run, config)
    if isinstance(config, (TrainConfig, SelfImproveConfig)):
        values["data"] = replace(config.data, split=unchecked(cls, {}).data.split)
    return values


def _values_of(run: Path, config: RunConfig) -> dict[str, Any]:
    """What a stage is to have in common with the run."""
    given = {f.name for f in fields(config)}
    values: dict[str, Any] = {name: getattr(config, name) for name in _OF_RUN if name in given}
    if isinstance(config, (PreferConfig, SftConfig)):
        del values["data"]  # pairs
    elif values.get("kl_coef") == 0:  # no optimum is at that
        del values["kl_coef"]
    if not isinstance(config, SftConfig) and (run / "reference").exists():
        role = config.policy
        start = getattr(config, role) or ModelConfig()
        # A soft prompt that began anew in the target began as no part of it.
        if role == "prompter" or start.adapter is not None:
            values[role] = replace(start, adapter=str(run / "reference"))
    return values


def _adapter(run: Path, command: str) -> str:
    folder = run / "adapter"
    if not (folder / "adapter_config.json").is_file():  # the file that is written last
        raise FileNotFoundError(
            f"--run {run}: it is not done, so there is no {folder}; `alignpro {command} "
            f"{run / CONFIG} --resume` goes on with it"
        )
    return str(folder)


def beside_the_run(config: EvalConfig, run: Path) -> dict[str, Any]:
    """What an evaluation asks for that `settings_of_run` does not say: evaluate.json."""
    values = _values_of_stage(EvalConfig, run, config_of_run(run))
    theirs = to_mapping(unchecked(EvalConfig, values))
    ours = to_mapping(config)
    del ours["trained"], ours["prompter"]
    return {name: value for name, value in ours.items() if value != theirs[name]}


def say_what_differs(
    config: StageConfig,
    made_from: Fingerprints,
    untuned: AdapterWeights | Mixture | None,
    rows: Sequence[PromptRow],
    *around: str | Path | None,
) -> None:
    """A warning for each thing that the run of, or around, the first of the paths was made from or
    by, and that is another one here; and for prompts that it was trained on."""
    run = run_around(*around)
    if run is None:
        return
    ours, values = to_mapping(config), _values_of(run, config_of_run(run))
    names = [name for name in values if name in ours and name not in _FREE]
    theirs = to_mapping(unchecked(type(config), values))
    then, now = fingerprints.read_fingerprints(run), dict(made_from)
    there, here = ({n: of[n] for n in names} for of in (theirs, ours))
    said = [
        f"{path} is {value!r} here, {was!r} in the run"
        for path, (was, value) in fingerprints.other_settings(there, here, then, now).items()
        if not path.endswith(".adapter")  # goes by what is in it, below
    ]
    if untuned is not None:
        now["adapter that training began with"] = fingerprints.of_adapter(untuned)
    trained_on = then.pop("data", None)
    said += fingerprints.differences(then, now, "the run was made from")
    for what in said:
        _log.warning("%s: %s", run, what)
    prompts = [row.prompt for row in rows]
    shared = [] if trained_on is None else fingerprints.shared_prompts(trained_on, prompts)
    if shared:
        _log.warning(
            "%s: %d of the %d prompts were trained on, %s among them",
            *(run, len(shared), len(prompts), shared[0]),
        )
