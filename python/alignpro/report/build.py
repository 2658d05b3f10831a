"""A run directory's report, from whatever the commands left there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignpro.report.check import check_report
from alignpro.report.html import is_report, write_report
from alignpro.train.metrics import read_metrics

# What an evaluation measures: taken together from one file, never mixed from two.
MEASURED = (
    "arms",
    "paired",
    "kl_per_rewrite",
    "kl_per_token",
    "gap_closed",
    "judge",
    "samples",
    "tokens_per_second",
)
_SEARCHED = "report.json, evaluation.json, metrics.jsonl, headroom.json or bound.json"


class BuiltReport(NamedTuple):
    path: Path
    report: dict[str, Any]
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
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(report, metrics) of a run directory.

    Found by name: report.json, evaluation.json, headroom.json, bound.json, metrics.jsonl and
    config.json; a file given by name goes before the one in the directory. What an evaluation
    measures comes from the evaluation where there is one, else from report.json.

    Raises:
        FileNotFoundError: no such directory, a file given that is not there, or nothing to report.
        ValueError: a file that is not JSON, or not what its name says.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such folder; expected a run's")
    sources = {
        "report": _read(run_dir / "report.json"),
        "evaluation": _read(_chosen(run_dir, "evaluation.json", evaluation)),
        "headroom": _read(_chosen(run_dir, "headroom.json", headroom)),
        "bound": _read(_chosen(run_dir, "bound.json", bound)),
    }
    log = run_dir / "metrics.jsonl"
    metrics = read_metrics(log) if log.exists() else []
    if not metrics and all(source is None for source in sources.values()):
        raise FileNotFoundError(f"{run_dir}: nothing to report; expected {_SEARCHED} in it")

    report = dict(sources["report"] or {})
    measured = sources["evaluation"]
    if measured is not None:
        if not measured.get("arms"):
            path = _chosen(run_dir, "evaluation.json", evaluation)
            raise ValueError(f"{path}: not what `alignpro evaluate` writes: it has no arms")
        report = {key: value for key, value in report.items() if key not in MEASURED} | measured
    for name, part, given in (("headroom", "frontier", headroom), ("bound", "terms", bound)):
        source = sources[name]
        if source is not None:
            report[name] = _unwrapped(source, name, part, _chosen(run_dir, f"{name}.json", given))
    config = _read(run_dir / "config.json") or {}
    report.setdefault("config", config)
    known = {**config, "model": (config.get("prompter") or {}).get("model")}
    for key in ("model", "reward", "seed"):
        if key not in report and known.get(key) is not None:
            report[key] = known[key]
    check_report(report, str(run_dir))
    return report, metrics


def _chosen(run_dir: Path, name: str, given: str | Path | None) -> Path:
    if given is None:
        return run_dir / name
    if not Path(given).is_file():
        raise FileNotFoundError(f"{given}: no such file")
    return Path(given)


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _unwrapped(source: Mapping[str, Any], name: str, part: str, path: Path) -> Mapping[str, Any]:
    """The part itself, or a report that holds it under its name."""
    inner = source.get(name)
    if part in source:
        return source
    if isinstance(inner, Mapping) and part in inner:
        return inner
    raise ValueError(f"{path}: not what `alignpro {name}` writes: it has no {part}")
