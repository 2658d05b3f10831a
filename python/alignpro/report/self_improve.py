"""The rounds of a self-improvement, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from alignpro.report.grids import Grid
from alignpro.report.tables import grid_table


def rounds_view(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the policy of each round does, and how far it is from the first."""
    scenes = all("chair" in row["measured"] for row in rows)
    named = ("CHAIR_I", "CHAIR_S", "true objects") if scenes else ()
    header = ("grounding", "copied", "confidence", "tokens", "KL to first", "KL to previous")
    title = "Measured on the same prompts after every round (round 0: the first policy)"
    return grid_table(
        Grid(title, ("round", *named, *header), [_cells(row, scenes) for row in rows])
    )


def round_line(row: Mapping[str, Any]) -> str:
    """A round in a line."""
    measured = row["measured"]
    chair = measured.get("chair")
    faithful = f"grounding {measured['grounding']:.3f}"
    if chair is not None and chair["per_mention"] is not None:
        faithful = f"CHAIR_I {chair['per_mention']:.3f}, {faithful}"
    return (
        f"round {row['round']}: {faithful}, confidence {measured['confidence']:.3f}, "
        f"{measured['tokens']:.1f} tokens, KL to the first {measured['kl_first']:.2f} nats"
    )


def _cells(row: Mapping[str, Any], scenes: bool) -> tuple[str, ...]:
    measured = row["measured"]
    names = ("per_mention", "per_description", "true_objects") if scenes else ()
    of_scenes = [measured["chair"][name] for name in names]
    others = ("grounding", "copied", "confidence", "tokens", "kl_first", "kl_previous")
    return (
        str(row["round"]),
        *("" if value is None else f"{value:.3f}" for value in of_scenes),
        *(f"{measured[name]:.{1 if name == 'tokens' else 3}f}" for name in others),
    )
