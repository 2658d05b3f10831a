"""The command line. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

from alignpro.cli import (
    bench,
    config,
    extract,
    mix,
    preference,
    report,
    serve,
    stages,
    theory,
)
from alignpro.cli.shared import app

__all__ = [
    "app",
    "bench",
    "config",
    "extract",
    "main",
    "mix",
    "preference",
    "report",
    "serve",
    "stages",
    "theory",
]


def main() -> None:
    app()
