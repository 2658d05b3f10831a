"""A learned reward and what it is worth, for the terminal."""

from __future__ import annotations

import math

from rich.console import Group

from alignpro.report.grids import Grid
from alignpro.report.tables import grid_table
from alignpro.train.reward_fit import RewardFit


def reward_view(fit: RewardFit) -> Group:
    """Its accuracy with the interval, and how often its confidence is right."""
    held_out = fit.held_out
    mean, low, high = held_out.accuracy
    of = f"{held_out.pairs} held-out pairs of {held_out.conversations} conversations"
    quality = Grid(
        f"On {of}",
        ("", "held out", "by chance"),
        (
            ("accuracy", f"{mean:.3f} [{low:.3f}, {high:.3f}]", "0.500"),
            ("accuracy of the longer answer", f"{held_out.longer:.3f}", "0.500"),
            ("log loss", f"{held_out.log_loss:.3f}", f"{math.log(2):.3f}"),
            ("Brier score", f"{held_out.calibration.brier:.3f}", "0.250"),
            ("calibration error", f"{held_out.calibration.error:.3f}", ""),
            (f"accuracy on the {fit.training} pairs fitted", f"{fit.training_accuracy:.3f}", ""),
        ),
        strong=0,
    )
    bins = Grid(
        "How often the higher reward is the chosen answer",
        ("confidence", "pairs", "mean confidence", "accuracy"),
        [
            (
                f"{b.low:.2f} to {b.high:.2f}",
                str(b.count),
                f"{b.confidence:.3f}",
                f"{b.accuracy:.3f}",
            )
            for b in held_out.calibration.bins
        ],
    )
    tried = Grid(
        "Cross-validation",
        ("strength", "log loss"),
        [(f"{strength:g}", f"{loss:.4f}") for strength, loss in fit.fold_losses.items()],
        strong=list(fit.fold_losses).index(fit.strength),
    )
    return Group(*(grid_table(grid) for grid in (quality, bins, tried)))
