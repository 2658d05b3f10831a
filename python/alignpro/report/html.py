"""The report of a run as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignpro.evaluate.results import Report
from alignpro.files import write_file
from alignpro.report import grids, plots, theory, words
from alignpro.report.frontier import frontier_svg
from alignpro.report.warnings import find_warnings

_MARK = '<meta name="generator" content="alignpro">'


def write_report(report: Report, metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes the page to ``path``, replacing it in one step, and returns it.

    Readable on a phone, in light and dark; no script, no address, no second file. Every value is
    escaped but the plots, which hold numbers and our own words alone.
    """
    write_file(path, render_report(report, metrics))
    return Path(path)


def is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)


def render_report(report: Report, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. Any part of the report may be absent, and so may the metrics."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        loader=PackageLoader("alignpro.report"),
    )
    evaluation = report.evaluation
    headroom = None if report.headroom is None else report.headroom.headroom
    environment.globals.update(grids=grids, theory=theory, words=words, plots=plots)
    environment.filters.update(number=words.number, svg=Markup)
    about = {"model": report.model, "reward": report.reward, "seed": report.seed}
    view = {
        "mark": Markup(_MARK),
        "about": [(key, str(value)) for key, value in about.items() if value is not None],
        "report": report,
        "evaluation": evaluation,
        "judge": None if evaluation is None else evaluation.judge,
        "safety": None if evaluation is None else evaluation.safety,
        "headroom": headroom,
        "frontier": "" if headroom is None else frontier_svg(headroom, evaluation),
        "bound": report.bound,
        "warnings": find_warnings(report, metrics),
        "curves": plots.curve_svgs(metrics, evaluation),
        "samples": [] if evaluation is None else evaluation.samples,
        "costs": grids.costs(report, metrics),
        "config": json.dumps(report.config, indent=2, ensure_ascii=False, default=str),
    }
    return environment.get_template("report.html.j2").render(view)


def _finalize(value: Any) -> Any:
    """What the template prints: text made printable; numbers and our own plots as they are."""
    return (
        words.printable(value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )
