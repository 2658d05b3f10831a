"""The report of a run as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from alignpro.files import write_file
from alignpro.report import grids, theory, words
from alignpro.report.check import check_report
from alignpro.report.warnings import find_warnings

_MARK = '<meta name="generator" content="alignpro">'


def write_report(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], path: str | Path
) -> Path:
    """Writes the page to ``path``, replacing it in one step, and returns it.

    Readable on a phone, in light and dark; no script, no address, no second file. Every value is
    escaped but the plots, which hold numbers and our own words alone.
    """
    path = Path(path)
    page = render_report(report, metrics)
    write_file(path, page)
    return path


def is_report(path: Path) -> bool:
    """Whether a file is a page that `write_report` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)


def render_report(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. Any part of the report may be absent, and so may the metrics.

    Raises:
        ValueError: a part of another shape than the contract's; see `check_report`.
    """
    check_report(report)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        loader=FunctionLoader(_template),
    )
    environment.globals.update(sample_arms=grids.sample_arms)
    view = {
        "mark": Markup(_MARK),
        "about": _about(report),
        "headline": words.headline(report),
        "verdicts": [said for _, said in words.verdicts(report)],
        "warnings": find_warnings(report, metrics),
        "evaluation": _evaluation(report),
        "judge": _judge(report.get("judge") or {}),
        "curves": _curves(metrics, report),
        "headroom": _headroom(report),
        "bound": _bound(report.get("bound") or {}),
        "samples": report.get("samples") or [],
        "costs": grids.costs(report, metrics),
        "versions": report.get("versions") or {},
        "config": _json(report.get("config") or {}),
    }
    return environment.get_template("report.html.j2").render(view)


def _about(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(k, str(report[k])) for k in ("model", "reward", "seed") if report.get(k) is not None]


def _evaluation(report: Mapping[str, Any]) -> dict[str, Any] | None:
    from alignpro.report.plots import arms_svg, paired_svg

    if not report.get("arms"):
        return None
    gap = report.get("gap_closed")
    return {
        "arms": grids.arms_grid(report),
        "arms_plot": Markup(arms_svg(report)),
        "paired": grids.paired_grid(report),
        "paired_plot": Markup(paired_svg(report)) if report.get("paired") else "",
        "texts": grids.texts_grid(report),
        "gap_closed": words.gap_closed_sentence(gap) if gap else "",
        "instruction": (report["arms"].get("static") or {}).get("instruction"),
    }


def _judge(judge: Mapping[str, Any]) -> dict[str, Any] | None:
    comparisons = judge.get("comparisons")
    if not comparisons:
        return None
    return {
        "name": judge.get("name", ""),
        "verdicts": [words.judge_verdict(name, row) for name, row in comparisons.items()],
        "grid": grids.judge_grid(judge),
        "facts": grids.judge_facts(judge),
    }


def _curves(
    metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> list[tuple[str, Markup]]:
    from alignpro.report.plots import curve_svgs

    return [(title, Markup(svg)) for title, svg in curve_svgs(metrics, report)]


def _headroom(report: Mapping[str, Any]) -> dict[str, Any] | None:
    from alignpro.report.frontier import frontier_svg

    headroom = report.get("headroom")
    if not headroom:
        return None
    gain = (report.get("paired") or {}).get("trained_minus_untuned")
    return {
        "words": theory.headroom_words(headroom),
        "plot": Markup(frontier_svg(headroom, report)),
        "grids": [theory.frontier_grid(headroom), theory.best_of_n_grid(headroom)],
        "measured": bool(gain) and words.is_number(report.get("kl_per_rewrite")),
    }


def _bound(bound: Mapping[str, Any]) -> dict[str, Any] | None:
    if not bound:
        return None
    holds, *rest = theory.bound_verdicts(bound)
    return {
        "holds": holds,
        "words": [said.text for said in rest],
        "grid": theory.bound_grid(bound),
        "rewards": theory.rewards_grid(bound),
        "facts": theory.bound_facts(bound),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _template(name: str) -> str:
    return files("alignpro.report").joinpath("templates", name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """What the template prints: text made printable; numbers and our own plots as they are."""
    return (
        words.printable(value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )
