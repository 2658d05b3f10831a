"""`alignpro init` and `alignpro config`: a configuration to start from, and every key of one."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from alignpro.cli.shared import app, check_new, examples, one_line_errors
from alignpro.run_directory import one_line

if TYPE_CHECKING:
    from alignpro.config import DataConfig
    from alignpro.data.load import PromptRow

Answer = TypeVar("Answer")

# What `init` writes. The rest keeps its default, which `alignpro config train` says.
_KEYS = (
    *("prompter.model", "target", "data.path", "data.split", "data.prompt", "on_too_long"),
    *("reward", "run_dir", "seed"),
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
    prefer = "prefer"
    self_improve = "self-improve"
    reward = "reward"
    evaluate = "evaluate"
    bound = "bound"
    mix = "mix"
    extract = "extract"
    serve = "serve"


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
        Stage.prefer: configs.PreferConfig,
        Stage.self_improve: configs.SelfImproveConfig,
        Stage.reward: configs.RewardFitConfig,
        Stage.evaluate: configs.EvalConfig,
        Stage.bound: configs.BoundConfig,
        Stage.mix: configs.MixConfig,
        Stage.extract: configs.ExtractConfig,
        Stage.serve: configs.ServeConfig,
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
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Column that holds the prompts; the default is the first of prompt, messages, "
            "conversations and turns."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Rows to train on, by their column split, if they have one.")
    ] = "train",
    model: Annotated[
        str | None, typer.Option(help="Path or name of the prompter; the default is smollm2.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Path or name of the target; the default is the prompter's.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Reward: vader, topic, hf:NAME, learned:FOLDER, or your MODULE:FUNCTION, which is "
            "written to edit where there is none; the default is my_reward:score."
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
    from alignpro.config import DataConfig, TrainConfig, load_yaml
    from alignpro.config.describe import commented_yaml
    from alignpro.data.files import NoColumnError
    from alignpro.data.load import load_prompts
    from alignpro.files import write_file
    from alignpro.models.resolve import find_model
    from alignpro.rewards.build import build_reward
    from alignpro.types import Conversation

    def prompts_of(path: str | None, column: str | None) -> tuple[DataConfig, list[PromptRow]]:
        if not path:
            raise ValueError(
                "--data: expected a file of prompts, or a hub name; there is no terminal"
            )
        source = DataConfig(path, split=split, prompt=column)
        try:
            return source, load_prompts(source)
        except NoColumnError as error:
            if prompt or not _is_terminal():
                raise NoColumnError(error.problem, "--prompt") from None
            if column:
                raise ValueError(error.problem) from None
            asked = f"{error.problem}. The column that holds prompts"
            return _answer(None, asked, None, lambda said: prompts_of(path, said))

    def model_of(name: str | None) -> str | None:
        if name and find_model(name) is None:
            typer.echo(f"{name}: not on this machine; the first run looks for it and fetches it")
        return name or None

    def reward_of(name: str) -> tuple[str, Path | None]:
        stub = _stub_of(name)
        if stub is None and "hf:" not in name:  # which would be fetched
            build_reward(name)
        return name, stub

    source, rows = _answer(
        data, "Prompts (a file, or a name on the hub)", None, lambda said: prompts_of(said, prompt)
    )
    model = _answer(model, "Prompter (a path or a name)", "smollm2", model_of)
    target = _answer(
        target, "Target (a path or a name; nothing: the prompter's model)", "", model_of
    )
    reward, stub = _answer(
        reward, "Reward (a name, or MODULE:FUNCTION of yours)", _REWARD, reward_of
    )
    run = _answer(run, "Directory of the run", "alignpro-run", str)
    if stub is not None:
        write_file(stub, _REWARD_FILE.format(name=reward.partition(":")[2]))
        typer.echo(f"{stub}: an example of a reward; edit it to say what a good answer is")
    values: dict[str, Any] = {
        "prompter.model": model,
        "target": target,
        "data.path": source.path,
        "data.split": split,
        "data.prompt": source.prompt,
        "reward": reward,
        "run_dir": run,
        "prompts_per_step": min(16, len(rows)),
        "heldout": {} if _has_validation(source) else None,
    }
    train = f"alignpro train {shlex.quote(str(config))}"
    write_file(
        config,
        "# Training of a prompter on your prompts:\n#\n"
        f"#   {train} --dry-run   # what it takes\n#   {train}\n#\n"
        "# Keys that are left out keep their default; `alignpro config train` prints them all.\n\n"
        + commented_yaml(TrainConfig, only=_KEYS, values=values),
    )
    load_yaml(TrainConfig, config)
    first = Conversation.of(rows[0].prompt).last_turn
    typer.echo(
        f"{source.path}: {len(rows)} prompts, such as: {shorten(first, 60, placeholder=' ...')}"
    )
    typer.echo(f"{config}: written; go on with: {train}")


def _answer(
    given: str | None, question: str, default: str | None, use: Callable[[Any], Answer]
) -> Answer:
    """What ``use`` makes of an option, or of what a person says, who is asked again where it
    refuses; of the default where nobody is there."""
    if given or not _is_terminal():
        return use(given or default)
    while True:
        said = typer.prompt(question, default=default, show_default=bool(default))
        try:
            return use(said.strip())
        except (ValueError, OSError, ImportError) as error:
            typer.echo(one_line(error))


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _has_validation(source: DataConfig) -> bool:
    """Whether a file has rows to watch while training."""
    from alignpro.data.files import DataError
    from alignpro.data.load import load_prompts

    if not Path(str(source.path)).is_file():
        return False
    try:
        return len(load_prompts(replace(source, split="validation"))) > 1
    except DataError:
        return False


def _stub_of(reward: str) -> Path | None:
    """The file of a function that is not there yet."""
    module, colon, function = reward.partition(":")
    named = module in ("hf", "learned") or not colon
    if named or not module.isidentifier() or not function.isidentifier():
        return None
    file = Path(f"{module}.py")
    return None if file.exists() or importlib.util.find_spec(module) is not None else file
