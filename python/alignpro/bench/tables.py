"""The benchmarks' numbers as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def score_tables(report: Mapping[str, Any]) -> Group:
    """Machine limits, two tables for each head, and the LoRA pass.

    "x ours" is in seconds, against ours for the same outputs.
    """
    parts: list[RenderableType] = [_limits_line(report)]
    for head in report["heads"]:
        parts += _head_tables(head)
    if report["lora_pass"] is not None:
        parts += _lora_tables(report["lora_pass"])
    return Group(*parts)


def step_table(report: Mapping[str, Any]) -> Table:
    """Seconds of one step by stage, memory, and what shows that the step was a real one."""
    table = Table(show_header=False, box=None)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("step", f"{report['seconds_per_step']:.2f} s"),
        *((stage, f"{s:.2f} s") for stage, s in report["seconds_by_stage"].items()),
        ("generation", f"{report['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", _mib(report["peak_rss_bytes"])),
        ("KL per rewrite", f"{report['kl_per_rewrite']:.3f} nats"),
        ("sampled against scored", f"{report['parity_max_abs']:g}"),
    ]
    for what, value in rows:
        table.add_row(Text(what), Text(value))
    return table


def generation_tables(report: Mapping[str, Any]) -> Group:
    """Tokens a second of decode, prefill or rollout, beside the machine's limits."""
    parts: list[RenderableType] = [_limits_line(report)]
    tables = {"rollout": _rollout_table, "growth": _growth_table}
    parts.append(tables.get(report["benchmark"], _throughput_table)(report))
    cold = report.get("cold_start_seconds")
    parts.append(
        Text(
            f"loaded in {report['load_seconds']:.2f} s, "
            + ("" if cold is None else f"first token of a new process after {cold:.2f} s, ")
            + f"peak memory {_mib(report['peak_rss_bytes'])}"
        )
    )
    return Group(*parts)


def profile_tables(report: Mapping[str, Any]) -> Group:
    """Stages in their order, then ops by time, beside the machine's limits."""
    whole = (
        f"{_seconds(report['seconds'])}, {report['generated_tokens']:,} tokens "
        f"({report['tokens_per_second']:,.0f} tokens/s) in {report['steps']} steps "
        f"of {report['rows_per_step']:.0f} rows"
    )
    parts: list[RenderableType] = [_limits_line(report), _stage_table(report), Text(whole)]
    if report["ops"] is not None:
        parts.append(_op_table(report["ops"]))
    if report["dropped"]:
        parts.append(
            Text(
                f"{report['dropped']:,} events did not fit: what is later is missing above; "
                "profile fewer prompts, or --no-ops"
            )
        )
    if report["no_reward"] is not None:
        parts.append(Text(f"no reward: {report['no_reward']}"))
    parts.append(Text(f"trace: {report['trace']} (ui.perfetto.dev or chrome://tracing opens it)"))
    return Group(*parts)


def _stage_table(report: Mapping[str, Any]) -> Table:
    table = _table(f"{report['prompts']} prompts x {report['rewrites']} rewrites x 1 response")
    for column in ("time", "share", "rows", "rows/s"):
        table.add_column(column, justify="right")
    for row in report["stages"]:
        rows, seconds = row["rows"], row["seconds"]
        table.add_row(
            Text(row["stage"]),
            Text(_seconds(seconds)),
            Text(f"{row['share']:.1%}"),
            Text("" if rows is None else f"{rows:,}"),
            Text(f"{rows / seconds:,.0f}" if rows and seconds > 0 else ""),
        )
    return table


def _op_table(ops: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("ops")
    table.collapse_padding = True  # 80 columns hold it
    table.columns[0].no_wrap = True
    for column in ("time", "share", "calls", "GFLOP/s", "of peak", "GB/s", "of reads"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in ops:
        cells = [row["op"], _seconds(row["seconds"]), f"{row['share']:.1%}"]
        if "calls" in row:
            cells += [
                f"{row['calls']:,}",
                f"{row['gflops']:.1f}",
                f"{row['fma_share']:.0%}",
                f"{row['gbps']:.1f}",
                f"{row['read_share']:.0%}",
            ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _limits_line(report: Mapping[str, Any]) -> Text:
    limits = report["limits"]
    return Text(
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads: "
        f"FMA peak {limits['fma_gflops']:.0f} GFLOP/s, "
        f"read bandwidth {limits['read_gbps']:.1f} GB/s; "
        f"medians of {report['repeats']}"
    )


def _throughput_table(report: Mapping[str, Any]) -> Table:
    table = _table(
        f"{report['benchmark']}, {report['compute']}, keys and values {report['kv_dtype']}"
    )
    columns = ("tokens/s", "decode tokens/s", "first token", "GFLOP/s", "of FMA peak", "of reads")
    for column in columns:
        table.add_column(column, justify="right")
    for row in report["results"]:
        name = f"{row['batch']} sequences"
        if "prompt_tokens" in row:
            name = f"{row['batch']} x {row['prompt_tokens']} tokens"
        decode, reads = row.get("decode_tokens_per_second"), row.get("read_share")
        cells = (
            name,
            f"{row['tokens_per_second']:,.0f}",
            "" if decode is None else f"{decode:,.0f}",
            _seconds(row["seconds_to_first_token"]),
            f"{row['gflops']:.0f}",
            f"{row['fma_share']:.0%}",
            "" if reads is None else f"{reads:.0%}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _growth_table(report: Mapping[str, Any]) -> Table:
    table = _table("decoding steps")
    for column in ("positions", "step", "tokens/s"):
        table.add_column(column, justify="right")
    for row in report["results"]:
        cells = (
            f"{row['compute']}, {row['batch']} sequences",
            f"{row['context']}",
            _seconds(row["seconds_per_step"]),
            f"{row['tokens_per_second']:,.0f}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _rollout_table(report: Mapping[str, Any]) -> Table:
    table = _table(f"{report['prompts']} prompts x {report['rewrites']} rewrites x 1 response")
    for column in ("time", "of interleaved"):
        table.add_column(column, justify="right")
    ratio = report["barrier_over_interleaved"]
    for name, share in (("interleaved", 1.0), ("barrier", ratio)):
        table.add_row(Text(name), Text(_seconds(report["seconds"][name])), Text(f"{share:.2f}"))
    table.caption = f"{report['tokens_per_second']:,.0f} tokens/s"
    table.caption_justify = "left"
    return table


_PASSES = {"forward": "forward", "forward_backward": "forward and backward"}


def _head_tables(head: Mapping[str, Any]) -> Iterator[RenderableType]:
    stored = f", stored as {head['stored_as']}" if head["stored_as"] else ""
    name = (
        f"{head['vocab_size']} x {head['hidden_size']} ({head['weight']} weight{stored}), "
        f"{head['num_tokens']} tokens"
    )
    for key, title in _PASSES.items():
        table = _table(f"{name}: {title}")
        for column in ("KL", "time", "x ours", "GFLOP/s", "of peak", "extra MiB"):
            table.add_column(column, justify="right")
        for row in head["implementations"]:
            if key in row:
                table.add_row(*(Text(cell) for cell in _head_cells(row, row[key])))
        yield table
    yield from _reasons(head["implementations"])


def _head_cells(row: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    yield row["name"]
    yield "yes" if "KL" in row["computes"] else "no"
    yield _seconds(values["seconds"])
    yield f"{values['ratio']:.2f}"
    yield f"{values['gflops']:.0f}"
    yield f"{values['fma_share']:.0%}"
    yield _mib(values["extra_bytes"], unit="")


def _lora_tables(lora: Mapping[str, Any]) -> Iterator[RenderableType]:
    table = _table(
        f"LoRA of rank {lora['rank']} on all linear layers, {lora['sequences']} x "
        f"{lora['tokens_each']} tokens: forward and backward"
    )
    for name in ("time", "x ours", "extra MiB", "nats per token"):
        table.add_column(name, justify="right")
    for row in lora["sides"]:
        if row["skipped"] is None:
            cells = (
                row["name"],
                _seconds(row["seconds"]),
                f"{row['ratio']:.2f}",
                _mib(row["extra_bytes"], unit=""),
                f"{row['nats_per_token']:.6f}",
            )
            table.add_row(*(Text(cell) for cell in cells))
    yield table
    yield from _reasons(lora["sides"])


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    return table


def _reasons(rows: list[Mapping[str, Any]]) -> Iterator[Text]:
    """Why a row has no numbers."""
    for row in rows:
        if row["skipped"] is not None:
            yield Text(f"skipped {row['name']}: {row['skipped']}")


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _mib(value: int | None, unit: str = " MiB") -> str:
    return "?" if value is None else f"{value / 2**20:,.1f}{unit}"
