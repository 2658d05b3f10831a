"""The paper's figure (Align-Pro, arXiv 2501.03486) at the size of a small machine.

    python tests/bench/paper_figure.py --models MODEL,MODEL --runs DIR [--seed 0]
                                       [--tasks house_rules,sentiment] [--prompters MODEL,...]
                                       [--targets MODEL,...] [--rate 3e-4,MODEL=1e-3]
                                       [--plot FILE.svg] [--threads N]

Every model as prompter before every model as target: the reward on held-out prompts with the
untuned prompter, with the trained one, and of the target tuned itself on the raw prompts (the
paper's oracle). A task is a configuration of `alignpro quickstart`; the target is tuned by RLOO on
the task's prompts, reward and sampling.

What a cell needs is made where it is missing under --runs: the prompter's warm start, its training,
the tuned target, and the arms. The same call goes on with what an interrupted one has left; what
was made with other settings or of other models is refused. Prints a Markdown table of the cells
that were asked for, and draws them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from alignpro.config import (
    QUICKSTART,
    EvalConfig,
    ModelConfig,
    QuickstartConfig,
    SftConfig,
    TrainConfig,
    differing,
    load_yaml,
    target_of,
    to_mapping,
)
from alignpro.evaluate.results import Evaluation, from_json, to_json
from alignpro.evaluate.run import run_evaluate
from alignpro.files import write_json
from alignpro.fingerprints import (
    Fingerprint,
    Fingerprints,
    differences,
    read_fingerprints,
    same_elsewhere,
)
from alignpro.models.fingerprint import fingerprint
from alignpro.models.resolve import resolve_model
from alignpro.report.words import interval, number, relative_change, share, share_interval
from alignpro.run_directory import CONFIG, read_record
from alignpro.train.checkpoint import MAY_CHANGE
from alignpro.train.run import run_sft, run_train

_SENTIMENT = Path(__file__).parents[2] / "examples" / "sentiment.yaml"
# What a run may be made with, to be taken as it is: adapters are those of other runs, which are
# looked at by themselves.
_FREE = (MAY_CHANGE - {"steps"}) | {"prompter.adapter", "trained", "tuned"}
_RATE = 3e-4
ARMS = {"untuned": "no tuning", "trained": "trained prompter", "tuned": "tuned target"}


class Task(NamedTuple):
    config: Path  # of `alignpro quickstart`
    tuning: dict[str, Any]  # fields of TrainConfig for the target's own tuning


TASKS = {
    # Most groups of raw answers earn the same, mostly nothing: larger groups, and those skipped.
    "house_rules": Task(
        QUICKSTART,
        {"steps": 40, "prompts_per_step": 4, "num_rewrites": 8, "zero_advantage_group": "skip"},
    ),
    # As the prompter's own.
    "sentiment": Task(_SENTIMENT, {}),
}


@dataclass(frozen=True)
class Cell:
    task: str
    prompter: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.task}, {_short(self.prompter)} before {_short(self.target)}"


def configure(cell: Cell, options: argparse.Namespace) -> Configured:
    """What a cell runs, and where: what cells share has one folder for all of them."""
    seed, threads = options.seed, options.threads
    task = TASKS[cell.task]
    settings = [f"prompter.model={json.dumps(cell.prompter)}", f"seed={seed}"]
    settings += [f"threads={json.dumps(threads)}"]
    quickstart = load_yaml(QuickstartConfig, task.config, settings)
    answering = replace(quickstart.target or ModelConfig(), model=cell.target)
    quickstart = replace(quickstart, target=answering)
    sft, train, evaluation = quickstart.stages()
    folder = options.runs / cell.task / f"seed-{seed}"
    warm = folder / f"warm-{_short(cell.prompter)}"
    tuned = folder / f"tuned-{_short(cell.target)}"
    trained = folder / f"{_short(cell.prompter)}-{_short(cell.target)}"
    started = replace(quickstart.prompter, adapter=str(warm / "adapter"))
    fields = {"data": train.data, "reward": train.reward, "response": train.response}
    fields |= {"kl_coef": train.kl_coef, "seed": seed, "threads": threads, "policy": "target"}
    fields |= {"learning_rate": options.rate.get(_short(cell.target), options.rate[""])}
    own = TrainConfig(
        prompter=ModelConfig(model=cell.target), run_dir=str(tuned), **fields | task.tuning
    )
    return Configured(
        replace(sft, run_dir=str(warm)),
        replace(train, prompter=started, run_dir=str(trained)),
        own,
        replace(
            evaluation,
            prompter=started,
            trained=str(trained / "adapter"),
            tuned=str(tuned / "adapter"),
            kl_coef=train.kl_coef,
            static=None,  # the page says what the best single instruction earns
            optimum=None,
            judge=None,
        ),
        trained.with_name(trained.name + ".json"),
    )


class Configured(NamedTuple):
    sft: SftConfig
    train: TrainConfig
    tuned: TrainConfig
    evaluation: EvalConfig
    output: Path


def run_cell(cell: Cell, options: argparse.Namespace) -> Evaluation:
    """The cell's evaluation; what of it is there is not made again.

    Raises ValueError for what is there of other settings or models.
    """
    todo = configure(cell, options)
    for config in (todo.sft, todo.train, todo.tuned):
        make_run(config, cell.name)
    if not todo.output.exists():
        print(f"{cell.name}: evaluation", flush=True)
        write_json(todo.output, to_json(run_evaluate(todo.evaluation, output=todo.output)))
    report = from_json(Evaluation, json.loads(todo.output.read_text("utf-8")), str(todo.output))
    trained = Path(todo.train.run_dir)
    check_same(todo.output, report.evaluation_config or {}, todo.evaluation, trained)
    return report


def make_run(config: SftConfig | TrainConfig, name: str) -> None:
    """Run what is configured, or go on with it; what is there is not made again. Raises as
    `check_same`."""
    folder = Path(config.run_dir)
    if (folder / "adapter" / "adapter_config.json").exists():
        check_same(folder, read_record(folder / CONFIG), config, folder)
        return
    print(f"{name}: {folder.name}", flush=True)
    resume = (folder / CONFIG).exists()
    if isinstance(config, SftConfig):
        run_sft(config, resume=resume)
    else:
        run_train(config, resume=resume)


def check_same(
    made: Path, recorded: dict[str, Any], config: SftConfig | TrainConfig | EvalConfig, run: Path
) -> None:
    """Refuse a run, or an evaluation of one, that was made otherwise than it would be now. Raises
    ValueError, which names what differs."""
    now: Fingerprints = {}
    target = target_of(config.prompter, getattr(config, "target", None))
    for role, model in {"prompter": config.prompter, "target": target}.items():
        hashed = fingerprint(resolve_model(model.name))
        now[f"weights of the {role}"] = Fingerprint(model.name, hashed)
    then = read_fingerprints(run)
    free = _FREE | same_elsewhere(then, now).keys()
    asked = to_mapping(replace(config, date=recorded.get("date")))  # any date
    other = [
        f"{key} was {was!r}, is {value!r}"
        for key, (was, value) in differing(recorded, asked).items()
        if key not in free
    ]
    other += differences(then, now, "it was made from")
    if other:
        raise ValueError(
            f"{made}: made otherwise ({'; '.join(other)}); move it away, or name other --runs"
        )


def table(cells: dict[Cell, Evaluation]) -> str:
    """In Markdown: mean, its interval and variance of every arm, and what the paper reports."""
    head = ["task", "prompter", "target", *ARMS.values(), "gap closed", "variance"]
    lines = [_row(head), _row("---" for _ in head)]
    for cell, report in cells.items():
        arms = []
        for name in ARMS:
            reward, varies = report.arms[name].reward, report.arms[name].reward_variance
            arms.append(f"{number(reward.mean)} ({interval(reward.ci95)}), {number(varies)}")
        gap, change = report.gap_closed, report.variance_change
        closed = "no clear gap"
        if gap is not None and gap.share is not None and gap.ci95 is not None:
            closed = f"{share(gap.share)} ({share_interval(gap.ci95)})"
        changed = "" if change is None else relative_change(change)
        models = (_short(cell.prompter), _short(cell.target))
        lines.append(_row([cell.task, *models, *arms, closed, changed]))
    return "\n".join(lines)


def draw(cells: dict[Cell, Evaluation], path: Path) -> None:
    """Mean with its interval above, variance below, a column a task; the suffix says the format."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = Figure(figsize=(4.8 * len(tasks), 5.2), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    width = 0.8 / len(ARMS)
    for column, task in enumerate(tasks):
        shown = {cell: report for cell, report in cells.items() if cell.task == task}
        above, below = grid[:, column]
        for place, (name, title) in enumerate(ARMS.items()):
            arms = [report.arms[name] for report in shown.values()]
            at = [index + (place - (len(ARMS) - 1) / 2) * width for index in range(len(shown))]
            means = [arm.reward.mean for arm in arms]
            reach = [
                [arm.reward.mean - arm.reward.low for arm in arms],
                [arm.reward.high - arm.reward.mean for arm in arms],
            ]
            above.bar(at, means, width, yerr=reach, capsize=2, label=title)
            below.bar(at, [arm.reward_variance for arm in arms], width)
        above.set_title(task.replace("_", " "))
        names = [f"{_short(cell.prompter)}\nbefore\n{_short(cell.target)}" for cell in shown]
        below.set_xticks(range(len(shown)), names, fontsize=7)
    grid[0, 0].set_ylabel("mean reward")
    grid[1, 0].set_ylabel("variance of the reward")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(path)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _short(model: str) -> str:
    return Path(model).name.removesuffix(".gguf")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    models = (options.prompters or options.models, options.targets or options.models)
    _check_names({*models[0], *models[1]}, options.rate)
    cells = [Cell(*names) for names in itertools.product(options.tasks, *models)]
    done = {cell: run_cell(cell, options) for cell in cells}
    print(table(done))
    if options.plot is not None:
        draw(done, options.plot)


def _check_names(models: set[str], rates: dict[str, float]) -> None:
    known: dict[str, str] = {}
    for model in sorted(models):
        other = known.setdefault(_short(model), model)
        if other != model:
            raise ValueError(
                f"{other} and {model}: two models of one name would share their runs; a copy or "
                "link of another name keeps them apart"
            )
    for model in rates.keys() - {"", *known}:
        raise ValueError(f"--rate: expected some of {', '.join(known)}, got {model!r}")


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return text.split(",")

    def rates(text: str) -> dict[str, float]:
        """By the target's name; under "" that of all others."""
        pairs = [part.rpartition("=") for part in names(text)]
        return {"": _RATE} | {model: float(rate) for model, _, rate in pairs}

    def tasks(text: str) -> list[str]:
        for name in names(text):
            if name not in TASKS:
                expected = f"expected some of {', '.join(TASKS)}, got {name!r}"
                raise argparse.ArgumentTypeError(expected)
        return names(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=names, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--tasks", type=tasks, default=list(TASKS))
    parser.add_argument("--prompters", type=names)
    parser.add_argument("--targets", type=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rate",
        type=rates,
        default={"": _RATE},
        help="of the target's own tuning; MODEL=RATE is that of one target",
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    main()
