"""The benchmarks' numbers as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from alignpro.bench.timeline import beyond

_SATURATED = 0.8  # of all processors' time
_WIDTH, _PROSE = 80, 24  # columns of a table, and of a cell, of which more is wrapped


def bench_tables(report: Mapping[str, Any]) -> RenderableType:
    if report["benchmark"] == "step":
        return step_table(report)
    if report["benchmark"] == "profile":
        return profile_tables(report)
    if report["benchmark"] == "soak":
        return soak_table(report)
    if report["benchmark"] == "request":
        return request_tables(report)
    if report["benchmark"] == "serve":
        return serve_tables(report)
    if report["benchmark"] == "lookup":
        return Group(Text(limits_text(report)), _lookup_table(report), Text(memory_text(report)))
    table = _rollout_table if report["benchmark"] == "rollout" else _throughput_table
    return Group(Text(limits_text(report)), table(report), Text(memory_text(report)))


def step_table(report: Mapping[str, Any]) -> Table:
    share = report["generate_fma_share"]
    rows = [
        ("step", f"{report['seconds_per_step']:.2f} s"),
        *((stage, f"{s:.2f} s") for stage, s in report["seconds_by_stage"].items()),
        ("generation", f"{report['tokens_per_second']:,.0f} tokens/s"),
        ("generation, of FMA peak", "?" if share is None else f"{share:.0%}"),
        ("peak memory", mib_text(report["peak_rss_bytes"])),
        ("KL per rewrite", f"{report['kl_per_rewrite']:.3f} nats"),
        ("sampled against scored", f"{report['parity_max_abs']:g}"),
    ]
    return new_table(limits_text(report), ("value",), rows)


def serve_tables(report: Mapping[str, Any]) -> Group:
    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield from (row["answer"], str(row["clients"]))
        yield f"{row['rate']:,.0f}/s"
        yield f"{row['requests']:,}"
        yield "?" if row["busy"] is None else f"{row['busy']:.0%}"
        for way in ("alone", "serve", "added"):
            yield " / ".join(f"{row[way][key] * 1e3:.2f}" for key in ("p50", "p99"))

    machine = report["machine"]
    said = (
        f"{machine['cpu']}, {machine['cpus']} CPUs: upstream, proxy and clients are processes of "
        f"it; {report['repeats']} rounds of {report['seconds']:g} s, not rewritten, paced. "
        "Milliseconds, p50 / p99, to the end of a whole answer and to the first byte of a stream"
    )
    columns = ("clients", "rate", "requests", "busy", "upstream alone", "through serve", "added")
    table = new_table("serve, not rewritten", columns, map(cells, report["results"]))
    if any((row["busy"] or 0) > _SATURATED for row in report["results"]):
        table.caption = "the CPUs were busy: times are also those of waiting for one"
    parts: list[RenderableType] = [Text(said), table]
    if report["rewritten"] is not None:
        parts += _rewritten_parts(report["rewritten"])
    return Group(*parts)


def _rewritten_parts(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        rewrite = " / ".join(f"{row['rewrite'][key] * 1e3:.1f}" for key in ("p50", "p99"))
        rate = f"{row['requests_per_second']:.1f}"
        reasons = ", ".join(f"{reason} {count}" for reason, count in row["reasons"].items())
        return f"{row['clients']} clients", rate, rewrite, reasons

    title = f"{found['run']}: rewritten as fast as clients ask"
    columns = ("requests/s", "rewrite ms, p50 / p99", "became of them")
    yield new_table(title, columns, map(cells, found["results"]))
    yield Text(f"{found['speedup']:.2f} times the requests of one client")


def profile_tables(report: Mapping[str, Any]) -> Group:
    whole = (
        f"{seconds_text(report['seconds'])}, {report['generated_tokens']:,} tokens "
        f"({report['tokens_per_second']:,.0f} tokens/s) in {report['steps']} steps "
        f"of {report['rows_per_step']:.0f} rows"
    )
    parts: list[RenderableType] = [Text(limits_text(report)), _stage_table(report), Text(whole)]
    if report["ops"] is not None:
        parts.append(_op_table(report["ops"]))
    if report["no_reward"] is not None:
        parts.append(Text(f"no reward: {report['no_reward']}"))
    return Group(*parts, *_ending(report))


def soak_table(report: Mapping[str, Any]) -> Table:
    words = {True: "holds", False: "does not hold", None: "not known"}
    rows = [
        (name, words[check["holds"]], check["seen"]) for name, check in report["checks"].items()
    ]
    asked = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report["requests"].items()))
    title = (
        f"{report['clients']} clients for {report['seconds']:.0f} s, "
        f"{report['requests_per_second']:,.0f} requests/s: {asked}"
    )
    table = new_table(title, ("", "seen"), rows)
    table.caption = ", ".join(f"{reason} {n:,}" for reason, n in report["reasons"].items())
    return table


def request_tables(report: Mapping[str, Any]) -> Group:
    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield row["phase"]
        yield from (f"{row[key] * 1e3:.2f}" for key in ("p50", "p99"))
        yield f"{row['share']:.1%}"
        for key in ("fma_share", "read_share"):
            yield limit_share(row[key]) if key in row else ""

    rows = [*report["phases"], {"phase": "request", **report["request"], "share": 1.0}]
    whose = report["run"] or report["model"]
    title = f"{whose}: {report['requests']} requests, one after another"
    columns = ("p50 ms", "p99 ms", "share", "of FMA peak", "of reads")
    table = new_table(title, columns, map(cells, rows))
    steps = [
        f"{row['stage']} step: p50 {row['p50'] * 1e3:.2f} ms, p99 {row['p99'] * 1e3:.2f} ms"
        for row in report["steps"]
        if row["steps"]
    ]
    said = ", ".join(f"{reason} {count}" for reason, count in report["reasons"].items())
    return Group(
        Text(limits_text(report)),
        table,
        Text(f"{'; '.join(steps)}; {report['steps_per_request']:.1f} steps a request; {said}"),
        *_ending(report),
    )


def _ending(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    if report["dropped"]:
        yield Text(
            f"{report['dropped']:,} events did not fit: what is later is missing above; "
            "profile fewer prompts, or --no-ops"
        )
    yield Text(f"trace: {report['trace']} (ui.perfetto.dev or chrome://tracing opens it)")


def _stage_table(report: Mapping[str, Any]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        rows, seconds = row["rows"], row["seconds"]
        return (
            row["stage"],
            seconds_text(seconds),
            f"{row['share']:.1%}",
            "" if rows is None else f"{rows:,}",
            f"{rows / seconds:,.0f}" if rows and seconds > 0 else "",
        )

    title = f"{report['prompts']} prompts x {report['rewrites']} rewrites x 1 response"
    return new_table(title, ("time", "share", "rows", "rows/s"), map(cells, report["stages"]))


def _op_table(ops: Sequence[Mapping[str, Any]]) -> Table:
    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield from (row["op"], seconds_text(row["seconds"]), f"{row['share']:.1%}")
        if "calls" in row:
            yield from (f"{row['calls']:,}", f"{row['gflops']:.1f}", limit_share(row["fma_share"]))
            yield from (f"{row['gbps']:.1f}", limit_share(row["read_share"]))

    columns = ("time", "share", "calls", "GFLOP/s", "of peak", "GB/s", "of reads")
    table = new_table("ops", columns, map(cells, ops))
    if any(beyond(op) for op in ops):
        table.caption = "* above the measured limit: from the caches, or it was measured too low"
    return table


def limit_share(share: float) -> str:
    """A share of what the machine can do; one above it is marked."""
    return f"{share:.0%}" + "*" * (share > 1)


def limits_text(report: Mapping[str, Any]) -> str:
    limits = report["limits"]
    return (
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads: "
        f"FMA peak {limits['fma_gflops']:.0f} GFLOP/s, "
        f"read bandwidth {limits['read_gbps']:.1f} GB/s; "
        f"medians of {report['repeats']}"
    )


def memory_text(report: Mapping[str, Any]) -> str:
    cold = report.get("cold_start_seconds")
    return (
        f"loaded in {report['load_seconds']:.2f} s, "
        + ("" if cold is None else f"first token of a new process after {cold:.2f} s, ")
        + f"peak memory {mib_text(report['peak_rss_bytes'])}"
    )


def _lookup_table(report: Mapping[str, Any]) -> Table:
    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield row["case"]
        yield f"{row['prompt_tokens']:.0f} + {row['new_tokens']}"
        for way in ("plain", "lookup"):
            yield " / ".join(f"{row[way][key] * 1e3:.0f}" for key in ("p50", "p99"))
        yield f"{row['speedup']:.2f}"
        yield f"{row['steps']:.1f}"
        yield f"{row['accepted_share']:.0%} of {row['drafted_share']:.0%}"
        yield "same" if row["bit_equal"] else "OTHER"

    title = f"lookup, {report['compute']}, one request at a time: ms, p50 / p99"
    columns = ("tokens", "plain", "lookup", "speedup", "steps", "accepted", "bits")
    return new_table(title, columns, map(cells, report["results"]))


def _throughput_table(report: Mapping[str, Any]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        name = "1 sequence" if row["batch"] == 1 else f"{row['batch']} sequences"
        if "prompt_tokens" in row:
            name = f"{row['batch']} x {row['prompt_tokens']} tokens"
        decode, reads = row.get("decode_tokens_per_second"), row.get("read_share")
        return (
            name,
            f"{row['tokens_per_second']:,.0f}",
            "" if decode is None else f"{decode:,.0f}",
            seconds_text(row["seconds_to_first_token"]),
            "?" if row["gflops"] is None else f"{row['gflops']:.0f}",
            "?" if row["fma_share"] is None else f"{row['fma_share']:.0%}",
            "" if reads is None else f"{reads:.0%}",
            *([f"{row['truncated_share']:.0%}"] if truncated else []),
        )

    truncated = report.get("top_p", 1) < 1
    title = f"{report['benchmark']}, {report['compute']}, keys and values {report['kv_dtype']}"
    columns = ["tokens/s", "decode tokens/s", "first token", "GFLOP/s", "of FMA peak", "of reads"]
    if truncated:
        columns.append(f"top-p {report['top_p']:g}, of plain")
    return new_table(title, columns, map(cells, report["results"]))


def _rollout_table(report: Mapping[str, Any]) -> Table:
    share, gflops = report["fma_share"], report["gflops"]
    cells = (
        "rollout",
        seconds_text(report["seconds"]),
        f"{report['tokens_per_second']:,.0f}",
        "?" if gflops is None else f"{gflops:.0f}",
        "?" if share is None else f"{share:.0%}",
    )
    title = f"{report['prompts']} prompts x {report['rewrites']} rewrites x 1 response"
    return new_table(title, ("time", "tokens/s", "GFLOP/s", "of FMA peak"), [cells])


def new_table(title: str, columns: Iterable[str] = (), rows: Iterable[Iterable[str]] = ()) -> Table:
    """A first column without a title names the rows; numbers stand to the right.

    Within 80 columns, in a terminal and in a log: where it has to be, titles wrap between words and
    columns move together. Cells wrap where they are prose.
    """
    names, cells = ["", *columns], [tuple(row) for row in rows]
    longest = [
        max((cell_len(r[i]) for r in cells if i < len(r)), default=0) for i in range(len(names))
    ]
    for wrap, padding in ((False, 1), (True, 1), (True, 0)):
        titles = [max(map(cell_len, name.split() if wrap else [name]), default=0) for name in names]
        widths = list(map(max, titles, longest))
        if sum(widths) + (1 + padding) * len(widths) <= _WIDTH or max(longest) > _PROSE:
            break
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding, table.padding = True, (0, padding)
    for name, width in zip(names, widths, strict=True):
        fixed = width if width <= _PROSE else None
        justify: Literal["left", "right"] = "right" if name else "left"
        table.add_column(name, justify=justify, width=fixed, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def seconds_text(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def mib_text(value: int) -> str:
    return f"{value / 2**20:,.1f} MiB"
