"""The command line. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import logging

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
    if logging.lastResort is not None:  # what is logged while nothing else shows it
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    app()
