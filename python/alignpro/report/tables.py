"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from alignpro.report.words import arms_of, component_names, mebibytes, printable, verdicts

# Model text is always given as Text: a plain str would be read as rich's own markup.


def arms_table(report: Mapping[str, Any]) -> Table:
    """Arms by row: mean reward with its 95% interval, variance, components, prompts."""
    components = component_names(report)
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column("arm")
    for title in ("mean reward", "95% interval", "variance", *components, "prompts"):
        table.add_column(Text(printable(title)), justify="right")
    for key, title, arm in arms_of(report):
        low, high = arm["ci95"]
        parts = arm.get("components") or {}
        cells = [
            title,
            f"{arm['mean_reward']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{arm['reward_variance']:.3f}",
            *(f"{parts[name]:.3f}" if name in parts else "" for name in components),
            str(arm["n"]),
        ]
        table.add_row(
            *(Text(printable(cell)) for cell in cells), style="bold" if key == "trained" else None
        )
    return table


def verdict_lines(report: Mapping[str, Any]) -> Text:
    """The paired differences in plain words, one line each."""
    return Text("\n".join(printable(sentence) for _, sentence in verdicts(report)))


def costs_table(report: Mapping[str, Any]) -> Table:
    """KL per rewrite, speed, memory, seconds by stage: as far as the report has them."""
    table = Table(show_header=False, box=None)
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in costs(report):
        table.add_row(Text(printable(what)), Text(value))
    return table


def costs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value with its unit) of what the run cost."""
    rows = []
    if report.get("kl_per_rewrite") is not None:
        rows.append(("KL per rewrite", f"{report['kl_per_rewrite']:.3f} nats"))
    if report.get("tokens_per_second") is not None:
        rows.append(("generation", f"{report['tokens_per_second']:,.0f} tokens/s"))
    if report.get("peak_rss_bytes") is not None:
        rows.append(("peak memory", mebibytes(report["peak_rss_bytes"])))
    rows += [(f"{stage} stage", f"{s:.1f} s") for stage, s in report.get("seconds", {}).items()]
    return rows


def samples_panel(samples: Sequence[Mapping[str, Any]]) -> Group:
    """Before and after, one panel a sample: what was asked, what was added, what was answered."""
    return Group(*(_sample_panel(sample) for sample in samples))


def _sample_panel(sample: Mapping[str, Any]) -> Panel:
    text = Text()
    for label, key, reward_key in (
        ("untuned rewrite", "rewrite_untuned", None),
        ("trained rewrite", "rewrite_trained", None),
        ("before", "response_raw", "reward_raw"),
        ("after", "response_trained", "reward_trained"),
    ):
        if sample.get(key) is None:
            continue
        reward = sample.get(reward_key) if reward_key else None
        suffix = "" if reward is None else f" (reward {reward:.3f})"
        text.append(f"{label}{suffix}: ", style="bold")
        text.append(printable(sample[key]).strip() + "\n")
    text.rstrip()
    title = Text(" ".join(printable(sample["prompt"]).split()))
    return Panel(text, title=title, title_align="left")
