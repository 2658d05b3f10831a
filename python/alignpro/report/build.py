"""A run directory's report, from whatever the commands left there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from alignpro.evaluate.results import (
    BoundReport,
    Evaluation,
    HeadroomReport,
    Report,
    Result,
    from_json,
)
from alignpro.report.html import is_report, write_report
from alignpro.run_directory import find_record
from alignpro.train.metrics import read_metrics

_SEARCHED = "report.json, evaluation.json, safety.json, metrics.jsonl, headroom.json or bound.json"


class BuiltReport(NamedTuple):
    path: Path
    report: Report
    metrics: list[dict[str, Any]]


def build_report(
    run_dir: str | Path,
    *,
    evaluation: str | Path | None = None,
    headroom: str | Path | None = None,
    bound: str | Path | None = None,
    out: str | Path | None = None,
) -> BuiltReport:
    """Writes report.html from what `load_report` finds, to ``out`` or into the run directory.

    Raises:
        ValueError, OSError: as `load_report`; nothing is written.
        FileExistsError: the file to write is there and is no report of ours.
    """
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    if not Path(run_dir).is_dir():
        raise FileNotFoundError(f"{run_dir}: no such folder; expected a run's")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
    if path.exists() and not is_report(path):
        raise FileExistsError(f"{path}: is there already and is no report; name another file")
    report, metrics = load_report(run_dir, evaluation=evaluation, headroom=headroom, bound=bound)
    return BuiltReport(write_report(report, metrics, path), report, metrics)


def load_report(
    run_dir: str | Path,
    *,
    evaluation: str | Path | None = None,
    headroom: str | Path | None = None,
    bound: str | Path | None = None,
) -> tuple[Report, list[dict[str, Any]]]:
    """(report, metrics) of a run directory.

    Found by name: report.json, evaluation.json, safety.json, headroom.json, bound.json,
    metrics.jsonl and config.json; a file given by name goes before the one in the directory. What
    an evaluation measures comes from the evaluation where there is one, else from report.json.

    Raises:
        FileNotFoundError: no such directory, a file given that is not there, or nothing to report.
        ValueError: a file that is not JSON, or not what its name says.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such folder; expected a run's")
    run, log = find_record(run_dir / "report.json"), run_dir / "metrics.jsonl"
    compared = _part(Evaluation, run_dir, "evaluation", evaluation, "arms")
    harm = _part(Evaluation, run_dir, "safety", None, "arms")  # of other prompts, maybe
    if harm is not None:
        whole = compared or harm
        compared = replace(whole, safety=whole.safety or harm.safety)
    found = {
        "evaluation": compared,
        "headroom": _part(HeadroomReport, run_dir, "headroom", headroom, "frontier"),
        "bound": _part(BoundReport, run_dir, "bound", bound, "terms"),
    }
    parts: dict[str, Any] = {name: part for name, part in found.items() if part is not None}
    metrics = read_metrics(log) if log.exists() else []
    if not (metrics or run or parts):
        raise FileNotFoundError(f"{run_dir}: nothing to report; expected {_SEARCHED} in it")
    config = find_record(run_dir / "config.json") or {}
    known = {**config, "model": (config.get("prompter") or {}).get("model"), "config": config}
    named = {key: known.get(key) for key in ("model", "reward", "seed", "config")}
    report = from_json(Report, {**named, **(run or {})}, str(run_dir / "report.json"))
    return replace(report, **parts), metrics


def _part(
    kind: type[Result], run_dir: Path, name: str, given: str | Path | None, key: str
) -> Result | None:
    """What a command wrote, known by a key that all of its kind have, or a report that holds it."""
    if given is not None and not Path(given).is_file():
        raise FileNotFoundError(f"{given}: no such file")
    path = run_dir / f"{name}.json" if given is None else Path(given)
    source = find_record(path)
    if source is None:
        return None
    inner = source.get(name)
    if key not in source and isinstance(inner, Mapping):
        source = dict(inner)
    if key not in source:
        what = "evaluate" if name == "evaluation" else name
        raise ValueError(f"{path}: not what `alignpro {what}` writes: it has no {key}")
    return from_json(kind, source, str(path))
