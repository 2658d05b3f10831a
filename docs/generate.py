"""Hooks of mkdocs: what the pages say of configurations, commands and metrics comes from the code.

A line ``<!-- generate: NAME -->`` of a page is replaced by what `GENERATED` has under the name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from alignpro import config as configs
from alignpro.config import ARMS
from alignpro.config.describe import as_yaml, describe
from alignpro.train.metrics import METRICS

STAGES = {
    "train": configs.TrainConfig,
    "sft": configs.SftConfig,
    "prefer": configs.PreferConfig,
    "self-improve": configs.SelfImproveConfig,
    "reward": configs.RewardFitConfig,
    "evaluate": configs.EvalConfig,
    "headroom": configs.HeadroomConfig,
    "bound": configs.BoundConfig,
    "quickstart": configs.QuickstartConfig,
    "extract": configs.ExtractConfig,
    "serve": configs.ServeConfig,
}


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n\n", "<br>").replace("\n", " ")


def table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def configuration() -> str:
    """Every key of every stage; a group that several hold is written once."""
    parts, written = [], {}
    for stage, cls in STAGES.items():
        keys, inside = [], ""
        for key in describe(cls):
            if inside and key.path.startswith(inside):
                continue
            inside, text = "", key.text
            if key.group is not None and not (stage == "quickstart" and key.path in STAGES):
                first = written.setdefault(key.group, f"{stage}: {key.path}")
                if first != f"{stage}: {key.path}":
                    inside, text = f"{key.path}.", f"{text} Its keys are those of `{first}`."
            if stage == "quickstart" and key.path in STAGES:
                inside = f"{key.path}."
                text += f" Its keys are those of `{key.path}`, without what is shared here."
            whole = key.group is not None and isinstance(key.default, key.group)
            default = "" if whole else f"`{as_yaml(key.default)}`"
            keys.append((f"`{key.path}`", cell(default), cell(text), cell(key.values)))
        parts.append(f"## {stage}\n\n{cls.__doc__.strip()}\n")
        parts.append(
            table(("key", "default", "what it is for", "what it may be"), iter(keys)) + "\n"
        )
    return "\n".join(parts)


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    import typer
    from typer.testing import CliRunner

    from alignpro.cli import app

    group: Any = typer.main.get_command(app)

    def names(of: Any, before: str) -> Iterator[str]:
        for name in of.list_commands(None):
            one = of.commands[name]
            yield from names(one, f"{name} ") if hasattr(one, "commands") else [before + name]

    parts = []
    for name in names(group, ""):
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "100"}).stdout
        parts.append(f"## alignpro {name}\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(parts)


def metrics() -> str:
    rows = ((f"`{name}`", f"`{one.tag}`", one.text) for name, one in METRICS.items())
    return table(("in metrics.jsonl", "in trackers", "what it is"), iter(rows))


def arms() -> str:
    return table(("arm", "in a report"), ((f"`{key}`", title) for key, title in ARMS.items()))


def rules() -> str:
    """The example that a page is about."""
    file = Path(__file__).parents[1] / "examples" / "rules.yaml"
    return f'```yaml title="examples/rules.yaml"\n{file.read_text("utf-8")}```'


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "metrics": metrics,
    "arms": arms,
    "rules": rules,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return re.sub(r"^<!-- generate: (\w+) -->$", lambda m: GENERATED[m[1]](), markdown, flags=re.M)
