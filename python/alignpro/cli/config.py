"""`alignpro init` and `alignpro config`: a configuration to start from, and every key of one."""

from __future__ import annotations

import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignpro.cli.shared import app, check_new, examples, one_line_errors

if TYPE_CHECKING:
    from alignpro.data.load import PromptRow

# What `init` writes. The rest keeps its default, which `alignpro config train` says.
_KEYS = (
    *("prompter.model", "target", "data", "split", "reward", "run_dir", "seed"),
    *("rewrite.max_new_tokens", "response.max_new_tokens", "response.temperature"),
    *("prompting.mode", "prompting.template", "steps", "learning_rate", "lora.rank"),
    *("prompts_per_step", "num_rewrites", "kl_coef", "heldout", "checkpoint_every"),
)
_REWARD = "my_reward:score"
_REWARD_FILE = '''"""What a good answer is: edit `{name}` to say it."""


def {name}(prompts, responses, **columns):
    """One number for each response, higher for a better one.

    prompts: the original prompts, as text. columns: the other columns of the data, by their name.
    """
    # An example: answers of about forty words.
    return [-abs(len(response.split()) - 40) / 40 for response in responses]
'''


class Stage(str, Enum):
    """The commands that a configuration is for."""

    quickstart = "quickstart"
    headroom = "headroom"
    sft = "sft"
    train = "train"
    evaluate = "evaluate"
    bound = "bound"


@app.command(
    epilog=examples(
        "alignpro config train", "alignpro config train kl_coef", "alignpro config evaluate"
    )
)
@one_line_errors
def config(
    stage: Annotated[Stage, typer.Argument(help="The command that the configuration is for.")],
    key: Annotated[
        str | None, typer.Argument(help="One key, or group of keys, with all that is said of it.")
    ] = None,
) -> None:
    """Print every key, its default and what it is for.

    What is printed is a configuration to edit.
    """
    from alignpro import config as configs
    from alignpro.config.describe import commented_yaml

    classes = {
        Stage.quickstart: configs.QuickstartConfig,
        Stage.headroom: configs.HeadroomConfig,
        Stage.sft: configs.SftConfig,
        Stage.train: configs.TrainConfig,
        Stage.evaluate: configs.EvalConfig,
        Stage.bound: configs.BoundConfig,
    }
    typer.echo(commented_yaml(classes[stage], key=key), nl=False)


@app.command(
    epilog=examples(
        "alignpro init",
        "alignpro init --data prompts.csv --reward my_reward:score",
        "alignpro init mine.yaml --data everyday --model smollm2 --reward topic",
    )
)
@one_line_errors
def init(
    config: Annotated[Path, typer.Argument(help="YAML file to write.")] = Path("alignpro.yaml"),
    data: Annotated[
        str | None,
        typer.Option(help="Prompts: a file (JSON Lines, JSON, CSV, Parquet), or a hub name."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Rows to train on, by their column split; the default is train."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Path or name of the prompter; the default is smollm2.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Path or name of the target; the default is the prompter's.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Reward: vader, topic, hf:NAME, or your MODULE:FUNCTION, which is written to edit "
            "where there is none; the default is my_reward:score."
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Directory of the run; the default is alignpro-run.")
    ] = None,
) -> None:
    """Write a configuration for prompts and a reward of your own.

    Questions are asked in a terminal, about what no option says.
    """
    check_new(config)
    from alignpro.config import TrainConfig, load_yaml
    from alignpro.config.describe import commented_yaml
    from alignpro.data.load import load_prompts
    from alignpro.files import write_file
    from alignpro.models.resolve import find_model
    from alignpro.rewards.build import build_reward

    data = data or _ask("Prompts (a file, or a name on the hub)", None)
    if data is None:
        raise ValueError("--data: expected a file of prompts, or a hub name; there is no terminal")
    rows = load_prompts(data, split=split)
    split, watched = _splits(rows, split)
    count = sum(split is None or row.columns.get("split") in (None, split) for row in rows)
    model = model or _ask("Prompter (a path or a name)", "smollm2") or "smollm2"
    target = target or _ask("Target (a path or a name; nothing: the prompter's model)", "") or None
    for name in filter(None, (model, target)):
        if find_model(name) is None:
            typer.echo(f"{name}: not on this machine; the first run fetches it")
    reward = reward or _ask("Reward (a name, or MODULE:FUNCTION of yours)", _REWARD) or _REWARD
    stub = _stub_of(reward)
    if stub is None and "hf:" not in reward:  # which would be fetched
        build_reward(reward)
    if stub is not None:
        write_file(stub, _REWARD_FILE.format(name=reward.partition(":")[2]))
        typer.echo(f"{stub}: an example of a reward; edit it to say what a good answer is")
    values: dict[str, Any] = {
        "prompter.model": model,
        "target": target,
        "data": data,
        "split": split,
        "reward": reward,
        "run_dir": run or _ask("Directory of the run", "alignpro-run") or "alignpro-run",
        "prompts_per_step": min(16, count),
        "heldout": {"split": watched} if watched is not None else None,
    }
    write_file(
        config,
        "# Training of a prompter on your prompts:\n#\n"
        f"#   alignpro train {config} --dry-run   # what it takes\n"
        f"#   alignpro train {config}\n#\n"
        "# Keys that are left out keep their default; `alignpro config train` prints them all.\n\n"
        + commented_yaml(TrainConfig, only=_KEYS, values=values),
    )
    load_yaml(TrainConfig, config)
    typer.echo(f"{data}: {count} prompts")
    typer.echo(f"{config}: written; go on with: alignpro train {config}")


def _ask(question: str, default: str | None) -> str | None:
    """What a person says; the default where none is there."""
    if not _is_terminal():
        return default
    answer: str = typer.prompt(question, default=default, show_default=bool(default))
    return answer.strip()


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _splits(rows: list[PromptRow], asked: str | None) -> tuple[str | None, str | None]:
    """The split to train on, and the one to watch; None: the data has no such rows."""
    found = dict.fromkeys(str(row.columns["split"]) for row in rows if row.columns.get("split"))
    watched = "validation" if "validation" in found else None
    if asked is not None or not found:
        return asked, watched
    if "train" in found:
        return "train", watched
    raise ValueError(f"--split: expected one of the data's, {', '.join(found)}; there is no train")


def _stub_of(reward: str) -> Path | None:
    """The file of a function that is not there yet."""
    module, colon, function = reward.partition(":")
    if not colon or not module.isidentifier() or not function.isidentifier() or module == "hf":
        return None
    file = Path(f"{module}.py")
    return None if file.exists() or importlib.util.find_spec(module) is not None else file
