"""The pages as a reader follows them: files, commands and code work, and lines are printed."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from alignpro import config as configs
from alignpro.cli import app
from alignpro.cli.config import Stage
from alignpro.cli.shared import read_settings
from alignpro.config import from_mapping
from alignpro.train.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(p for p in DOCS.glob("*.md"))
_BLOCK = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.M | re.S)
SMALL = ["threads=1", "steps=1", "prompts_per_step=2", "num_rewrites=2"]
SHORT = ["rewrite.max_new_tokens=4", "response.max_new_tokens=4"]


@pytest.fixture(autouse=True)
def own_modules():
    """A reader's modules are imported by a process of their own."""
    yield
    for name in ("my_reward", "my_rewards"):
        sys.modules.pop(name, None)


def blocks(page, language=None):
    """(language, title, text) of the fenced blocks, in order."""
    for margin, kind, title, text in _BLOCK.findall(page.read_text("utf-8")):
        if language is None or kind == language:
            yield kind, title, re.sub(rf"^{margin}", "", text, flags=re.M)


def commands_of(page):
    """The words of every line that begins with alignpro, continued lines joined."""
    for _, _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("alignpro "):
                yield shlex.split(line, comments=True)[1:]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def parsed(words):
    """The command's name and its parameters; click's errors are raised."""
    group, name = typer.main.get_command(app), words[0]
    command, rest = group.commands[name], words[1:]
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(name, rest) as context:
        return name, context.params


def test_the_tutorial_from_an_empty_folder(tiny_model_dir, tmp_path, monkeypatch):
    """Every file, command and line of Python, on a tiny model and few steps."""
    monkeypatch.chdir(tmp_path)
    model, done = str(tiny_model_dir("llama")), []
    for kind, title, text in blocks(DOCS / "tutorial.md"):
        if title:
            Path(title).write_text(text)
        elif kind == "python":
            exec(compile(text, "tutorial.md", "exec"), {})
            done.append("python")
        for line in text.splitlines() if kind == "bash" else ():
            name, *words = shlex.split(line)[1:]
            if name == "init":
                words += ["--model", model]
            elif name == "train":
                words += [*SMALL, *SHORT]
            elif name == "evaluate":
                words += [f"prompter={model}", "threads=1", "num_rewrites=1", *SHORT]
            elif name == "generate":
                words += ["--max-new-tokens", "3", "--threads", "1"]
            run(name, *words)
            done.append(name)
    assert done == ["init", "train", "train", "train", "evaluate", "report", "generate", "python"]
    assert "<html" in Path("alignpro-run/report.html").read_text()[:200]


def test_the_notebook_runs(tiny_model_dir, tmp_path, monkeypatch):
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    text = "\n".join(cells).replace('"smollm2"', repr(str(tiny_model_dir("llama"))))
    text = text.replace("STEPS = 8", "STEPS = 1").replace("num_rewrites=4,", "num_rewrites=2,")
    assert "STEPS = 1" in text
    (tmp_path / "cells.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0 reward [+-]\d\.\d+, KL 0\.00 nats$", done.stdout, re.M)
    assert re.search(r"^trained +[+-]\d\.\d+$", done.stdout, re.M)
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if "outputs" in cell)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_pages_are_commands(page, tmp_path, monkeypatch):
    """Their options exist, and their settings are keys with such values."""
    monkeypatch.chdir(tmp_path)
    for _, title, text in blocks(page):
        if title:
            Path(title).write_text(text)
    for words in commands_of(page):
        name, values = parsed(words)
        if "overrides" in values:
            named = {s.value: c for s, c in STAGES.items()} | {"safety": "EvalConfig"}
            stage = getattr(configs, named[name])
            file = values.get("config")
            there = file is not None and (Path(file).exists() or "=" in file)
            read_settings(stage, file if there else None, values["overrides"])


STAGES = {
    Stage.quickstart: "QuickstartConfig",
    Stage.headroom: "HeadroomConfig",
    Stage.sft: "SftConfig",
    Stage.train: "TrainConfig",
    Stage.prefer: "PreferConfig",
    Stage.self_improve: "SelfImproveConfig",
    Stage.reward: "RewardFitConfig",
    Stage.evaluate: "EvalConfig",
    Stage.bound: "BoundConfig",
    Stage.mix: "MixConfig",
    Stage.extract: "ExtractConfig",
    Stage.serve: "ServeConfig",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_of_the_pages_are_keys(page):
    """A block of YAML fits at least one of the stages."""
    for _, _, text in blocks(page, "yaml"):
        mapping = yaml.safe_load(text)
        errors = []
        for name in STAGES.values():
            try:
                from_mapping(getattr(configs, name), mapping)
                break
            except ValueError as error:
                errors.append(str(error))
        else:
            pytest.fail(f"{text}\n" + "\n".join(errors))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_pages_compiles_and_names_what_there_is(page):
    import alignpro

    for _, _, text in blocks(page, "python"):
        compile(text, page.name, "exec")
        for name in re.findall(r"\balignpro\.(\w+)", text):
            assert hasattr(alignpro, name) or importlib.util.find_spec(f"alignpro.{name}"), name


def test_rewards_of_the_page_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, title, text in blocks(DOCS / "rewards.md", "python"):
        if title:
            Path(title).write_text(text)
        else:
            exec(compile(text, "rewards.md", "exec"), {})
    for _, _, text in blocks(DOCS / "rewards.md", "yaml"):
        from alignpro.rewards import build_reward

        reward = build_reward(yaml.safe_load(text)["reward"])
        rows = {"prompts": ["a"], "rewrites": [""], "responses": ["one two"], "answer": ["two"]}
        assert list(reward(**rows)) == [0.5]
        for nothing in (None, ""):  # of a table's empty cell: no score, and no 1
            assert list(reward(**{**rows, "answer": [nothing]})) == [0.0]


LINES = re.findall(
    r"^`(.+)`\n<!-- try: (.+) -->$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M
)


@pytest.mark.parametrize(("line", "command"), LINES, ids=[command for _, command in LINES])
def test_lines_of_troubleshooting_are_printed(line, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions.csv").write_text("question\nWhy?\nHow?\n")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    assert line in run(*shlex.split(command)[1:], code=2).stderr


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_has_every_key_command_and_number(generate):
    keys = generate.configuration()
    for path in ("kl_coef", "closed_form.loss", "lora.rank", "judge.base_url", "data.path"):
        assert f"| `{path}` |" in keys
    assert "Its keys are those of `train: prompter`." in keys
    numbers = generate.metrics()
    assert all(f"| `{name}` |" in numbers for name in METRICS)
    assert "## alignpro bench decode" in generate.commands()
    page = generate.on_page_markdown("a\n<!-- generate: arms -->\nb")
    assert page.startswith("a\n| arm |") and page.endswith("\nb")
    with pytest.raises(KeyError):
        generate.on_page_markdown("<!-- generate: nothing -->")


def test_links_between_pages_are_there():
    """Also without mkdocs, which CI builds the pages with."""
    for page in PAGES:
        for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", page.read_text("utf-8")):
            assert (DOCS / link).is_file(), f"{page.name}: {link}"
    nav = re.findall(r": ([\w-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(nav) == [page.name for page in PAGES]
