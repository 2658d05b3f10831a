"""The report of a run as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from alignpro.report.plots import reward_svg
from alignpro.report.tables import costs
from alignpro.report.words import arms_of, component_names, printable, verdicts


def write_report(
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> Path:
    """Writes the page to ``path``, replacing it in one step, and returns it.

    Readable on a phone, in light and dark; no script, no address, no second file. Every value is
    escaped but the plot, which holds numbers and our own words alone.
    """
    path = Path(path)
    page = render_report(report, metrics, samples)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render_report(
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    """The page as text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    template = files("alignpro.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        arms=arms_of(report),
        components=component_names(report),
        verdicts=verdicts(report),
        costs=costs(report),
        samples=samples,
        plot=Markup(reward_svg(metrics, report)),
        config=json.dumps(report.get("config", {}), indent=2, ensure_ascii=False, default=str),
    )


def _finalize(value: Any) -> Any:
    """What the template prints: text made printable; numbers and our own plot as they are."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
