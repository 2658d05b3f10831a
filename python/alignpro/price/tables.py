"""The price for a person: tables, and a sentence on time that claims no more than is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def price_tables(report: dict[str, Any]) -> RenderableType:
    return Group(
        *(_models(report), _tokens(report), _flops(report), _memory(report)),
        *_asked(report),
        Text(hours_line(report)),
    )


def _asked(report: dict[str, Any]) -> list[Text]:
    asked = report["endpoint"]
    return [] if asked is None else [Text(asked_line(asked))]


def asked_line(asked: dict[str, Any]) -> str:
    """Of an endpoint, and whether its budgets suffice."""
    line = (
        f"{asked['name']}: {asked['calls']:,} calls, about {asked['input_tokens']:,} tokens read "
        f"(its chat template is not known) and at most {asked['output_tokens']:,} written"
    )
    if asked["cost"] is None:
        line += "; client.input_price and output_price would say the cost"
    else:
        line += f", cost about {asked['cost']:.4g}"
    if asked["budgets_too_small"]:
        names = " and ".join(f"client.budget.{name}" for name in asked["budgets_too_small"])
        line += f". {names} may end the run before"
    return line + "."


def fit_tables(report: dict[str, Any]) -> RenderableType:
    """Of `price_fit`."""
    has = report["available_bytes"]
    line = f"About {_size(report['memory_bytes'])}"
    line += "" if has is None else f", of {_size(has)} that are free on this machine"
    line += f". {report['rows']} {report['rows_are']}, of {report['longest_tokens']} tokens at "
    line += f"most; {_micro_batches(report)} a step at most. Time is not priced."
    return Group(_models(report), _memory(report), *_asked(report), Text(line))


def hours_line(report: dict[str, Any]) -> str:
    device, rates = report["device"], report["rates"]
    limits = f"{device['gflops'] / 1e3:.4g} TFLOP/s and {device['gbps']:.4g} GB/s"
    limits += f" ({device['source']})"
    ending = f"{_fit_line(report)} Left out: {', '.join(report['left_out'])}."
    if rates is None:
        return (
            f"Time on {device['name']}: at least {_duration(report['least_hours'])} at the limits "
            f"of {limits}, if every rewrite and response runs to its maximum; no rate has been "
            f"measured on this device yet (--rates FILE). {ending}"
        )
    return (
        f"Time on {device['name']}: {_duration(report['hours'])} "
        f"({report['seconds_per_step']:.3g} s a step) if every rewrite and response runs to its "
        f"maximum, at {rates['generate']:.0%} (generation), {rates['score']:.0%} (scoring) and "
        f"{rates['bytes']:.0%} (bytes) of {limits}, shares from {rates['source']}. "
        f"{ending}"
    )


def _fit_line(report: dict[str, Any]) -> str:
    need, device = report["memory_bytes"], report["device"]
    if report["fits"] is None:
        return f"Memory needed: {_size(need)}."
    has = _size(device["memory_bytes"])
    if report["fits"] == "yes":
        return f"{_size(need)} fits in its {has}."
    least = _size(report["least_memory_bytes"])
    if report["fits"] == "no":
        return f"Does not fit: {least} with one sequence at a time, of {has}."
    return f"{_size(need)} fits in its {has} only with fewer sequences at once."


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names to the left, numbers to the right; a last row "in all" in bold."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "in all" else None)
    return table


def _models(report: dict[str, Any]) -> Table:
    def row(role: str, model: dict[str, Any]) -> Sequence[str]:
        weights = f"{_size(model['weight_bytes'])} ({model['storage']})"
        held = "the prompter's" if model.get("shared") else weights
        return role, model["name"], _count(model["parameters"]), held, model["source"]

    columns = ("", "name", "parameters", "weights", "sizes from")
    return _table("Models", columns, [row(*item) for item in report["models"].items()])


def _micro_batches(report: dict[str, Any]) -> str:
    count = report["micro_batches"]
    return f"{count} micro-batch{'es' * (count != 1)}"


def _tokens(report: dict[str, Any]) -> Table:
    return _table(
        f"Tokens, at most ({report['lengths']['source']}; {_micro_batches(report)} a step)",
        ("", "a step", f"{report['steps']} steps"),
        [
            (name, f"{count:,}", _count(report["tokens"][name]))
            for name, count in report["tokens_per_step"].items()
        ],
    )


def _flops(report: dict[str, Any]) -> Table:
    flops, moved = report["flops_per_step"], report["bytes_per_step"]
    counts = {name: (flops[name], moved[name]) for name in flops}
    counts["in all"] = (sum(flops.values()), sum(moved.values()))
    rows = [(name, f"{f / 1e12:.3g}", f"{b / 1e9:.3g}") for name, (f, b) in counts.items()]
    return _table("Operations and bytes read, a step", ("", "TFLOP", "GB"), rows)


def _memory(report: dict[str, Any]) -> Table:
    sizes = {**report["memory"], "in all": report["memory_bytes"]}
    return _table("Memory", ("", "held"), [(name, _size(size)) for name, size in sizes.items()])


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1000 else _count(count, "GB", "MB", "kB")


def _count(count: float, *units: str) -> str:
    for unit, factor in zip(units or ("G", "M"), (10**9, 10**6, 10**3), strict=False):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:,.0f}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.3g} hours" if hours < 1000 else f"{hours:,.0f} hours"
    return f"{hours * 60:.2g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"
