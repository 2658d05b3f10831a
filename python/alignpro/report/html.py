"""The report of a run as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from alignpro.evaluate.results import BoundReport, Evaluation, Headroom, JudgeResult, Report
from alignpro.files import write_file
from alignpro.report import grids, theory, words
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
    """Whether a file is a page that `write_report` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)


def render_report(report: Report, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. Any part of the report may be absent, and so may the metrics."""
    from alignpro.report.plots import curve_svgs

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        loader=FunctionLoader(_template),
    )
    evaluation = report.evaluation
    environment.globals.update(in_order=words.in_order, arm_title=words.arm_title)
    environment.filters.update(number=words.number)
    about = {"model": report.model, "reward": report.reward, "seed": report.seed}
    view = {
        "mark": Markup(_MARK),
        "about": [(key, str(value)) for key, value in about.items() if value is not None],
        "headline": words.headline(evaluation),
        "verdicts": [] if evaluation is None else words.verdicts(evaluation),
        "warnings": find_warnings(report, metrics),
        "evaluation": None if evaluation is None else _evaluation(evaluation),
        "judge": None if evaluation is None else _judge(evaluation.judge),
        "curves": [(title, Markup(svg)) for title, svg in curve_svgs(metrics, evaluation)],
        "headroom": _headroom(report.headroom, evaluation),
        "bound": _bound(report.bound),
        "samples": [] if evaluation is None else evaluation.samples,
        "costs": grids.costs(report, metrics),
        "versions": report.versions,
        "config": json.dumps(report.config, indent=2, ensure_ascii=False, default=str),
    }
    return environment.get_template("report.html.j2").render(view)


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    from alignpro.report.plots import arms_svg, paired_svg

    gap, static = evaluation.gap_closed, evaluation.arms.get("static")
    return {
        "arms": grids.arms_grid(evaluation),
        "arms_plot": Markup(arms_svg(evaluation)),
        "paired": grids.paired_grid(evaluation),
        "paired_plot": Markup(paired_svg(evaluation)) if evaluation.paired else "",
        "texts": grids.texts_grid(evaluation),
        "gap_closed": "" if gap is None else words.gap_closed_sentence(gap),
        "instruction": None if static is None else static.instruction,
    }


def _judge(judge: JudgeResult | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    return {
        "name": judge.name,
        "verdicts": words.judge_verdicts(judge),
        "grid": grids.judge_grid(judge),
        "facts": grids.judge_facts(judge),
    }


def _headroom(headroom: Headroom | None, evaluation: Evaluation | None) -> dict[str, Any] | None:
    from alignpro.report.frontier import frontier_svg

    if headroom is None:
        return None
    measured = evaluation is not None and evaluation.kl_per_rewrite is not None
    return {
        "words": theory.headroom_words(headroom),
        "plot": Markup(frontier_svg(headroom, evaluation)),
        "grids": [theory.frontier_grid(headroom), theory.best_of_n_grid(headroom)],
        "measured": measured,
    }


def _bound(bound: BoundReport | None) -> dict[str, Any] | None:
    if bound is None:
        return None
    holds, *rest = theory.bound_verdicts(bound)
    return {
        "holds": holds,
        "words": [said.text for said in rest],
        "grid": theory.bound_grid(bound),
        "rewards": theory.rewards_grid(bound),
        "facts": theory.bound_facts(bound),
    }


def _template(name: str) -> str:
    return files("alignpro.report").joinpath("templates", name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """What the template prints: text made printable; numbers and our own plots as they are."""
    return (
        words.printable(value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )
