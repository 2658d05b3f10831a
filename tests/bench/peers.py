"""alignpro's benchmarks beside its peers on the same work, in one call.

    python tests/bench/peers.py step         --model MODEL.gguf --json FILE
    python tests/bench/peers.py decode       --model MODEL.gguf --json FILE [--batch 1,16,64] ...
    python tests/bench/peers.py prefill      --model MODEL.gguf --json FILE [--shape 1x512] ...
    python tests/bench/peers.py rollout      --model MODEL.gguf --json FILE [--prompts 16]
    python tests/bench/peers.py environments [--peers a,b]

Ours runs before the peers and after them, so that a drift of the machine is seen; its row is the
median of both. Every peer has a virtual environment of its own under --folder (made where it is
missing; `environments` makes them all) and gets the sizes and the prompts of our own run: the same
weights, temperature 1, log-probabilities, no end, no prefix cache, a warm-up, as many threads. A
peer that cannot run is in the table and in the JSON with its reason. A ratio is the seconds of a
peer over ours: how many times as fast ours is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from environments import NAMES, Unavailable, last_line, python_of
from registry import PEERS, Peer, run_peer

Row = dict[str, Any]
COMPUTES = {
    "decode": ("float32", "int8"),
    "prefill": ("float32", "int8"),
    "rollout": ("float32",),
    "step": ("float32",),
}
CASE = ("batch", "prompt_tokens", "new_tokens")  # what two rows of one case have in common


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    folder = options.folder.resolve()
    if options.benchmark == "environments":
        _make_environments(options.peers, folder)
        return
    if options.json is not None and options.json.exists():
        raise SystemExit(f"--json: {options.json} is there already; name another file")
    if not options.model.exists():
        raise SystemExit(f"--model: no such file or folder: {options.model}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise SystemExit(f"--json: no such folder: {options.json.parent}; make it first")
    if options.repeats < 1:
        raise SystemExit(f"--repeats: expected 1 or more, got {options.repeats}")
    report = compare(options, folder)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    # Wide enough where the output is a file.
    Console(width=max(Console().width, 100)).print(table(report))
    for row in report["results"]:
        if row["skipped"] is not None:
            print(f"{row['name']}, {_case_text(row) or 'a step'}: skipped: {row['skipped']}")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours, the peers, and ours again."""
    benchmark, model = options.benchmark, options.model.resolve()
    computes, chosen = COMPUTES[benchmark], _chosen(options.peers, benchmark)
    before = {compute: run_ours(benchmark, model, compute, options) for compute in computes}
    request = request_of(before[computes[0]], options.repeats)
    peers = []
    for peer in chosen:
        _say(peer.name)
        try:
            peers.append((peer, run_peer(peer, request, model, folder)))
        except Unavailable as reason:
            peers.append((peer, {"failed": str(reason), "results": []}))
    after = {compute: run_ours(benchmark, model, compute, options) for compute in computes}
    ours = [row for compute in computes for row in our_rows(before[compute], after[compute])]
    rows = [row for peer, report in peers for row in peer_rows(peer, report, ours)]
    return {
        "benchmark": benchmark,
        "model": model.name,
        "machine": before[computes[0]]["machine"],
        "repeats": options.repeats,
        "results": ours + rows,
        "runs": {
            "before": before,
            "peers": {peer.name: report for peer, report in peers},
            "after": after,
        },
    }


def run_ours(
    benchmark: str, model: Path, compute: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The report of `alignpro bench` in a process of its own."""
    _say(f"alignpro {compute}")
    command = [sys.executable, "-c", "from alignpro.cli import main; main()", "bench", benchmark]
    command += ["--model", str(model)]
    command += ["--steps" if benchmark == "step" else "--repeats", str(options.repeats)]
    if len(COMPUTES[benchmark]) > 1:
        command += ["--compute", compute]
    for name in ("batch", "new_tokens", "prompt_tokens", "shape", "prompts", "threads"):
        value = getattr(options, name, None)
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "ours.json"
        done = subprocess.run([*command, "--output", str(file)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"alignpro bench {benchmark}: {last_line(done.stderr)}")
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return report


def request_of(ours: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The work of our own run, as `harness.Request` takes it, without model and variant."""
    cases = [
        {
            "batch": row["batch"],
            "prompt_tokens": row.get("prompt_tokens", ours.get("prompt_tokens")),
            "new_tokens": ours.get("new_tokens", 1),  # prefill: up to and with the first token
        }
        for row in ours.get("results", [])
    ]
    return {
        "benchmark": ours["benchmark"],
        "threads": ours["machine"]["threads"],
        "repeats": repeats,
        "vocab_size": ours.get("vocab_size", 0),
        "cases": cases,
        "prompts": ours.get("prompts", 0),
    }


def our_rows(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """One row a case, over both runs; ``runs_seconds`` are the medians of each, in order."""
    rows = []
    for first, second in zip(_our_cases(before), _our_cases(after), strict=True):
        seconds = [first["all_seconds"], second["all_seconds"]]
        row = {
            "name": f"alignpro {before.get('compute', 'float32')}",
            **{key: first.get(key) for key in CASE},
            **_speed(first["tokens"] + second["tokens"], seconds[0] + seconds[1]),
            "runs_seconds": [statistics.median(one) for one in seconds],
            **_of_process(before),
            "logprobs": True,
            "version": before["machine"]["versions"].get("alignpro"),
        }
        row["peak_rss_bytes"] = max(before["peak_rss_bytes"], after["peak_rss_bytes"])
        rows.append(row)
    return rows


def _our_cases(report: dict[str, Any]) -> list[Row]:
    """The cases of one of our reports, with the tokens that each call is counted for."""
    benchmark = report["benchmark"]
    if benchmark == "step":
        seconds = report["all_seconds"]
        return [{"all_seconds": seconds, "tokens": [report["generated_tokens"]] * len(seconds)}]
    if benchmark == "rollout":
        return [
            {
                "batch": report["prompts"] * report["rewrites"],
                "all_seconds": report["all_seconds"],
                "tokens": report["generated_tokens"],
            }
        ]
    cases = request_of(report, report["repeats"])["cases"]
    return [
        {
            **case,
            "all_seconds": row["all_seconds"],
            "tokens": [_counted(benchmark, case)] * len(row["all_seconds"]),
        }
        for case, row in zip(cases, report["results"], strict=True)
    ]


def peer_rows(peer: Peer, report: dict[str, Any], ours: list[Row]) -> list[Row]:
    """One row for each case of ours; a case without numbers says why."""
    found = {_case(row): row for row in report["results"]}
    rows = []
    for case in dict.fromkeys(_case(row) for row in ours):
        sizes = dict(zip(CASE, case, strict=True))
        row = {"name": peer.name, **sizes, "version": report.get("version"), "skipped": None}
        measured = found.get(case, {"skipped": report.get("failed") or "not in its report"})
        if measured.get("skipped"):
            rows.append({**row, **_speed([], []), "skipped": measured["skipped"]})
            continue
        seconds = measured["all_seconds"]
        tokens = measured.get("tokens") or [_counted(report["benchmark"], sizes)] * len(seconds)
        row |= {**_speed(tokens, seconds), **_of_process(report), "logprobs": measured["logprobs"]}
        row["ratios"] = {
            one["name"]: one["tokens_per_second"] / row["tokens_per_second"]
            for one in ours
            if _case(one) == case
        }
        rows.append(row)
    return rows


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in CASE)


def _counted(benchmark: str, case: Row) -> int:
    """Tokens that a call is counted for, as in our own reports."""
    return case["batch"] * case["prompt_tokens" if benchmark == "prefill" else "new_tokens"]


def _speed(tokens: list[int], seconds: list[float]) -> Row:
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "seconds": statistics.median(seconds) if seconds else None,
        "all_seconds": seconds,
        "skipped": None,
    }


def _of_process(report: dict[str, Any]) -> Row:
    return {key: report[key] for key in ("load_seconds", "peak_rss_bytes")}


def table(report: dict[str, Any]) -> Table:
    """A row for each side and case; a ratio is how many times as fast ours is."""
    names = [f"alignpro {compute}" for compute in COMPUTES[report["benchmark"]]]
    shown = Table(
        title=f"{report['benchmark']}, {report['model']}: medians",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    ratios = [f"/ {name.removeprefix('alignpro ')}" for name in names]
    for column in ("", "case", "tokens/s", "s", *ratios, "load", "peak"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in sorted(report["results"], key=_order):
        cells = [row["name"], _case_text(row)]
        if row["skipped"] is not None:
            cells.append("skipped")
        else:
            ratios = row.get("ratios", {})
            cells += [f"{row['tokens_per_second']:,.1f}", f"{row['seconds']:.3f}"]
            cells += [f"{ratios[name]:.2f}x" if name in ratios else "" for name in names]
            cells += [f"{row['load_seconds']:.1f} s", f"{row['peak_rss_bytes'] / 1e9:.2f} GB"]
        shown.add_row(*cells)
    return shown


def _case_text(row: Row) -> str:
    batch, prompt, new = _case(row)
    if batch is None:
        return ""
    return str(batch) if prompt is None else f"{batch} x {prompt}+{new}"


def _order(row: Row) -> tuple[int, int]:
    """Case by case; within a case as they ran."""
    batch, prompt, _ = _case(row)
    return (batch or 0, prompt or 0)


def _chosen(text: str | None, benchmark: str) -> list[Peer]:
    able = [peer for peer in PEERS if benchmark in peer.benchmarks]
    if text is None:
        return able
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in {peer.name for peer in able}]
    if unknown:
        raise SystemExit(
            f"--peers: expected some of {', '.join(p.name for p in able)}; got {', '.join(unknown)}"
        )
    return [peer for peer in able if peer.name in names]


def _make_environments(text: str | None, folder: Path) -> None:
    names = NAMES if text is None else tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise SystemExit(f"--peers: expected some of {', '.join(NAMES)}; got {', '.join(unknown)}")
    for name in names:
        try:
            print(f"{name:14} {python_of(name, folder)}", flush=True)
        except Unavailable as reason:
            print(f"{name:14} skipped: {reason}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--peers", help="separated by commas; default: all that can")
    common.add_argument(
        "--folder",
        type=Path,
        default=Path("build/peers"),
        help="of environments and converted models",
    )
    measured = argparse.ArgumentParser(add_help=False, parents=[common])
    measured.add_argument("--model", type=Path, required=True)
    measured.add_argument("--json", type=Path)
    measured.add_argument("--repeats", type=int, default=5, help="after one to warm up")
    measured.add_argument("--threads", type=int)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    # What is not given here is left to `alignpro bench`, and the peers do what it did.
    decode = commands.add_parser("decode", parents=[measured])
    decode.add_argument("--batch")
    decode.add_argument("--new-tokens", type=int)
    decode.add_argument("--prompt-tokens", type=int)
    commands.add_parser("prefill", parents=[measured]).add_argument("--shape")
    commands.add_parser("rollout", parents=[measured]).add_argument("--prompts", type=int)
    commands.add_parser("step", parents=[measured])
    commands.add_parser("environments", parents=[common])
    return parser


if __name__ == "__main__":
    main()
