"""What --help says, what its examples do, and the configurations that can be printed and begun."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.cli.shared import read_settings
from alignpro.config import (
    BoundConfig,
    EvalConfig,
    ExtractConfig,
    HeadroomConfig,
    MixConfig,
    PreferConfig,
    QuickstartConfig,
    RewardFitConfig,
    SelfImproveConfig,
    ServeConfig,
    SftConfig,
    TrainConfig,
    from_mapping,
    load_yaml,
)
from alignpro.config.describe import commented_yaml, describe
from alignpro.train.metrics import read_metrics

STAGES = {
    "quickstart": QuickstartConfig,
    "headroom": HeadroomConfig,
    "sft": SftConfig,
    "train": TrainConfig,
    "prefer": PreferConfig,
    "self-improve": SelfImproveConfig,
    "reward": RewardFitConfig,
    "evaluate": EvalConfig,
    "bound": BoundConfig,
    "serve": ServeConfig,
}
WORDS = "prompt,kind\nWhy is the sky blue?,why\nHow do bees fly?,how\nWhat is a tide?,what\n"
TRAIN_SHORTLY = (
    *("train", "alignpro.yaml", "threads=1", "steps=1", "num_rewrites=2"),
    "rewrite.max_new_tokens=2",
)


def run(*arguments, code=0, **options):
    result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text(WORDS)
    yield tmp_path
    for name in ("my_reward", "mine"):  # imported by processes of their own
        sys.modules.pop(name, None)


def every(group=None, name=""):
    """(name as typed, command) of every command, those of a group (alignpro bench) included."""
    for key, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from every(command, f"{name}{key} ")
        else:
            yield name + key, command


COMMANDS = dict(every())
COMMAND_OF = {"reward": "reward fit"}  # the others have the name of their configuration


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['alignpro', '-h']\n"
        "from alignpro.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'tokenizers', 'rich', 'jinja2', 'yaml', 'torch', 'alignpro._core'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_commands_in_the_order_of_a_users_work():
    lines = run("-h").stdout.split("Commands:")[1].splitlines()
    listed = [line.split()[0] for line in lines if line]
    first = ["quickstart", "init", "config", "headroom", "sft", "train", "prefer"]
    assert listed[:9] == [*first, "self-improve", "reward"]
    assert set(listed) == set(typer.main.get_command(app).commands)
    assert not any("..." in line for line in lines)  # whole sentences, in a terminal of 80 columns


def test_the_version_is_the_packages():
    import alignpro

    assert run("--version").stdout == f"alignpro {alignpro.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_sentences(name):
    command = COMMANDS[name]
    for text in (command.help, *(p.help for p in command.params if p.name != "help")):
        assert text and text[0].isupper() and text.endswith("."), text


def test_one_thing_has_one_name():
    """Results go to --output, and a run is --run; bench and profile take what others take."""
    names = {option for c in COMMANDS.values() for p in c.params for option in p.opts}
    assert {"--output", "--run", "--model", "--seed"} <= names
    assert not names & {"--json", "--out", "--run-dir", "--run_dir", "--output-file"}


def examples_of(command):
    return [line.strip() for line in (command.epilog or "").splitlines() if "alignpro " in line]


@pytest.fixture(scope="module")
def a_users_folder(tiny_model_dir, tmp_path_factory):
    """What the examples name: a configuration, data, and a run."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "prompts.csv").write_text(WORDS)
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "instruction": "b"}\n')
    (folder / "question.txt").write_text("Why?")
    (folder / "evaluation.json").write_text("{}")
    with contextlib.chdir(folder):
        model = tiny_model_dir("llama")
        run("init", "--data", "prompts.csv", "--model", model, "--reward", "topic")
        run(*TRAIN_SHORTLY)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_the_help_work(name, a_users_folder, monkeypatch):
    monkeypatch.chdir(a_users_folder)
    examples = examples_of(COMMANDS[name])
    assert examples and f"  {examples[-1]}" in run(*name.split(), "-h").stdout
    for example in examples:
        program, *words = shlex.split(example.partition(" < ")[0])
        typed = name.split()
        assert program == "alignpro" and words[: len(typed)] == typed, example
        with COMMANDS[name].make_context(name, words[len(typed) :]) as context:
            values = context.params
        if name in STAGES:
            settings = read_settings(STAGES[name], values["config"], values["overrides"])
            assert settings != STAGES[name]() or not values["overrides"]
        for key in ("run", "evaluation"):
            if key in values and values[key] is not None and name in ("generate", "report"):
                assert Path(values[key]).exists(), example
        if name == "config":
            run(*words)


def test_an_example_with_an_unknown_key_is_seen():
    with pytest.raises(ValueError, match="unknown configuration key"):
        read_settings(SftConfig, None, ["sed=1"])


@pytest.mark.parametrize("stage", STAGES)
def test_overrides_of_the_argument_help_are_keys_of_the_command(stage):
    command = COMMANDS[COMMAND_OF.get(stage, stage)]
    (text,) = (p.help for p in command.params if p.name == "overrides")
    made = load_yaml(STAGES[stage], None, [w.strip(".") for w in text.split() if "=" in w])
    if stage == "reward":
        assert (made.seed, made.model.model) == (1, "smollm2")
    elif stage == "serve":
        assert (made.threads, made.guards.language) == (1, False)
    else:
        assert (made.seed, made.prompter.model) == (1, "smollm2")


@pytest.mark.parametrize("cls", [*STAGES.values(), MixConfig, ExtractConfig])
def test_every_key_has_a_sentence_and_its_default(cls):
    for key in describe(cls):
        assert key.sentence[:1].isupper() and key.sentence.endswith("."), key
        assert ". " not in key.sentence.replace("...", ""), f"{key.path}: more than one sentence"


@pytest.mark.parametrize("stage", STAGES)
def test_what_config_prints_is_the_default_configuration(stage, here):
    printed = run("config", stage).stdout
    assert from_mapping(STAGES[stage], yaml.safe_load(printed)) == STAGES[stage]()
    for line, after in zip(printed.splitlines(), printed.splitlines()[1:], strict=False):
        if after.strip() and "#" not in after:  # a key has its sentence above it
            assert line.strip().startswith("#"), after
    assert max(map(len, printed.splitlines())) <= 110


def test_config_tells_all_of_one_key():
    text = run("config", "train", "closed_form.loss").stdout
    assert "docs/notes/closed-form.md" in text and "kl_coef:" not in text
    line = run("config", "train", "kl_ceof", code=2).stderr
    assert line == 'alignpro: kl_ceof: no such key; did you mean "kl_coef"?\n'


def test_a_field_without_a_docstring_is_seen():
    from dataclasses import make_dataclass

    from alignpro.config.describe import as_yaml

    assert as_yaml("yes") == '"yes"' and as_yaml(("a b", 1)) == "[a b, 1]"
    with pytest.raises((OSError, TypeError)):  # no source: nothing is made up
        list(describe(make_dataclass("Made", [("x", int, 1)])))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", ["a: b", "1e3", "null", "x # y", "", "'", "é\n", "=", "0x1"])
def test_any_text_is_read_back(stage, value):
    path = {stage: "run_dir" for stage in ("sft", "prefer", "self-improve")}
    path = (path | {"reward": "date", "serve": "run"}).get(stage, "reward")
    text = commented_yaml(STAGES[stage], values={path: value})
    assert yaml.safe_load(text)[path] == value


def test_init_then_train(here, tiny_model_dir):
    done = run("init", "--data", "prompts.csv", "--model", tiny_model_dir("llama"))
    assert "prompts.csv: 3 prompts" in done.output and "my_reward.py" in done.output
    assert "go on with: alignpro train alignpro.yaml" in done.output
    settings = yaml.safe_load(Path("alignpro.yaml").read_text())
    assert settings["data"]["path"] == "prompts.csv" and settings["reward"] == "my_reward:score"
    run(*TRAIN_SHORTLY)
    assert read_metrics("alignpro-run/metrics.jsonl")[0]["reward_mean"] < 0
    assert "is there already" in run("init", "--data", "prompts.csv", code=2).stderr


def answering(monkeypatch, answers):
    """A person at a terminal; returns what was asked, by its first word."""
    asked, waiting = [], iter(answers)

    def prompt(question, default=None, show_default=True):
        asked.append(question.split()[0])
        return next(waiting)

    monkeypatch.setattr("alignpro.cli.config._is_terminal", lambda: True)
    monkeypatch.setattr(typer, "prompt", prompt)
    return asked


def test_init_asks_what_no_option_says(here, tiny_model_dir, monkeypatch):
    answers = ["prompts.csv", str(tiny_model_dir("llama")), "", "mine:short", "runs"]
    asked = answering(monkeypatch, answers)
    run("init", "mine.yaml")
    assert asked == ["Prompts", "Prompter", "Target", "Reward", "Directory"]
    made = load_yaml(TrainConfig, "mine.yaml")
    assert (made.reward, made.run_dir, made.target) == ("mine:short", "runs", None)
    assert "def short(" in Path("mine.py").read_text()


def test_init_asks_again_for_what_it_cannot_use(here, tiny_model_dir, monkeypatch):
    Path("q.csv").write_text("id,question\n1,Why?\n2,How?\n")
    model = str(tiny_model_dir("llama"))
    answers = ["qq.csv", "q.csv", "frage", "question", "no/such.gguf", model, "", "vadr", "topic"]
    asked = answering(monkeypatch, [*answers, "runs"])
    said = run("init").output
    again = ["Prompts", "Prompts", "q.csv,", "q.csv,", "Prompter", "Prompter"]
    assert asked == [*again, "Target", "Reward", "Reward", "Directory"]
    for line in ("qq.csv: there is no such", "no column 'frage'", "no/such.gguf", "'vadr'"):
        assert line in said
    assert load_yaml(TrainConfig, "alignpro.yaml").data.prompt == "question"


def test_init_uses_the_splits_that_are_there(here):
    rows = [{"prompt": f"say {i}", "split": "validation" if i > 6 else "train"} for i in range(10)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("init", "--data", "p.jsonl", "--reward", "topic")
    made = load_yaml(TrainConfig, "alignpro.yaml")
    assert made.data.split == "train" and made.heldout.data.split == "validation"
    assert made.prompts_per_step == 7 and "p.jsonl: 7 prompts, such as: say 0" in done.output


def test_init_takes_another_column(here):
    Path("q.csv").write_text("id,question\n1,Why?\n2,How?\n")
    line = run("init", "--data", "q.csv", code=2).stderr
    assert "prompt" in line and "question" in line  # which columns there are
    run("init", "--data", "q.csv", "--prompt", "question", "--reward", "topic")
    assert load_yaml(TrainConfig, "alignpro.yaml").data.prompt == "question"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--data: expected a file of prompts"),
        (["--data", "missing.csv"], "missing.csv"),
        (["--data", "prompts.csv", "--model", "no/such.gguf"], "no/such.gguf"),
        (["--data", "prompts.csv", "--reward", "vadr"], "vadr"),
        (["--data", "prompts.csv", "--reward", "os:nothing"], "has no 'nothing'"),
        (["here/there.yaml", "--data", "prompts.csv"], "here: no such folder"),
    ],
)
def test_bad_input_of_init_is_one_line_and_leaves_nothing(options, line, here):
    error = run("init", *options, code=2).stderr
    assert line in error and error.count("\n") == 1
    assert os.listdir() == ["prompts.csv"]


def test_a_first_setting_is_taken_as_it_was_typed():
    refused = CliRunner().invoke(app, ["serve", "upstream=ftp://a//v1/"])
    assert refused.exit_code == 2 and "got 'ftp://a//v1/'" in refused.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--steps", "3"], "--steps; fields of the configuration are given as steps=..."),
        (["evaluate", "--kl-coef=1"], "fields of the configuration are given as kl_coef=..."),
        (["train", "--config", "x"], "the file of the configuration is the first argument"),
        (["train", "--dryrun"], "(Possible options: --dry-run)"),
        (["generate", "Why?", "--steps", "3"], "No such option: --steps (Possible"),
    ],
)
def test_an_option_that_is_a_field_elsewhere_says_how_it_is_given(arguments, line):
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and line in refused.output
    assert refused.output.count("No such option") == 1


def test_what_is_logged_beside_no_bar_is_called_a_warning():
    typed = [sys.executable, "-m", "alignpro", "evaluate", "split=x", "seed=few"]
    said = subprocess.run(typed, capture_output=True, text=True, check=False).stderr
    assert said.splitlines()[0] == "warning: split: is now data.split"
