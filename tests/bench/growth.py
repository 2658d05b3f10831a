"""What one more sequence, and one more position, costs a decoding step.

python tests/bench/growth.py [--model MODEL] [--batch 1,2,4] [--context 128,256]
                             [--compute float32,int8] [--json FILE] [--plot FILE.svg]
                             [--repeats 9] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpro.bench.generation import Say, open_report
from alignpro.bench.machine import peak_rss_bytes
from alignpro.bench.tables import limits_text, memory_text, new_table, seconds_text
from alignpro.bench.work import random_prompts
from alignpro.cli.shared import check_new, write_json
from alignpro.models.native_model import NativeModel
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.types import SamplingParams

_MAX_BATCH_ROWS = 512  # prompt rows of one step, and so at least as many sequences


def bench_growth(
    *,
    model: Path,
    batches: Sequence[int],
    contexts: Sequence[int],
    threads: int,
    computes: Sequence[str] = ("float32",),
    repeats: int = 9,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Decoded tokens a second by batch, at the shortest context, and by context, for one sequence.

    Each figure is the median of ``repeats`` steps that only decode, all sequences at once, the
    last of them ending at ``context`` positions at the latest.

    Raises:
        ValueError, OSError: a model that does not load, or whose context is too short.
    """
    cells = [(batch, min(contexts)) for batch in sorted(batches)]
    cells += [(1, context) for context in sorted(contexts)]
    # What cannot be done is refused before anything is timed.
    for batch, context in cells:
        _new_tokens(batch, context, repeats)
    report: dict[str, Any] = {}
    models = []
    for compute in computes:
        loaded, opened = open_report(
            "growth",
            model,
            threads,
            repeats,
            report.get("limits"),
            compute=compute,
            max_batch_rows=_MAX_BATCH_ROWS,
        )
        report = report or opened
        models.append((compute, loaded))
        if max(contexts) > loaded.context_length:
            raise ValueError(
                f"context: the model holds {loaded.context_length} positions, "
                f"{max(contexts)} were asked for"
            )
    results: list[dict[str, Any]] = []
    for compute, loaded in models:
        for batch, context in dict.fromkeys(cells):
            say(f"{compute}, {batch} x {context} positions")
            step = statistics.median(_decode_steps(loaded, batch, context, repeats))
            results.append(
                {
                    "compute": compute,
                    "batch": batch,
                    "context": context,
                    "seconds_per_step": step,
                    "tokens_per_second": batch / step,
                }
            )
    return {
        **report,
        "compute": ", ".join(computes),
        "results": results,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def growth_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws the results of `bench_growth`: by batch and by context, a line for each arithmetic.

    The suffix of ``path`` chooses the format, as matplotlib knows it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    by_batch, by_context = figure.subplots(1, 2)
    shortest = min(row["context"] for row in report["results"])
    for compute in dict.fromkeys(row["compute"] for row in report["results"]):
        rows = [row for row in report["results"] if row["compute"] == compute]
        for axes, key, shown in (
            (by_batch, "batch", [row for row in rows if row["context"] == shortest]),
            (by_context, "context", [row for row in rows if row["batch"] == 1]),
        ):
            shown.sort(key=lambda row: row[key])
            axes.plot(
                [row[key] for row in shown],
                [row["tokens_per_second"] for row in shown],
                marker="o",
                markersize=3,
                label=compute,
            )
    by_batch.set_xlabel(f"sequences at {shortest} positions")
    by_context.set_xlabel("positions of one sequence")
    for axes in (by_batch, by_context):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("decoded tokens/s")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, facecolor="white")


def _new_tokens(batch: int, context: int, repeats: int) -> int:
    """What each sequence writes, so that all of them decode together for ``repeats`` steps."""
    # The first sequences decode while the others' prompts are still being read.
    waiting = -(-(batch - 1) * context // _MAX_BATCH_ROWS)
    new_tokens = repeats + waiting + 2
    if new_tokens >= context:
        raise ValueError(
            f"context: expected more than the {new_tokens} tokens that {batch} sequences write "
            f"here, got {context}; ask for a longer one"
        )
    return new_tokens


def _decode_steps(model: NativeModel, batch: int, context: int, repeats: int) -> list[float]:
    """Seconds of ``repeats`` steps in which every sequence decodes."""
    new_tokens = _new_tokens(batch, context, repeats)
    handles = [
        model.submit(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=index))
        for index, prompt in enumerate(
            random_prompts(model.config["vocab_size"], batch, context - new_tokens)
        )
    ]
    while not all(handle.sequence.tokens for handle in handles):
        model.step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        model.step()
        seconds.append(time.perf_counter() - started)
    if any(handle.finished for handle in handles):
        raise AssertionError("a sequence ended before all of its steps were timed")
    for handle in handles:
        handle.cancel()
    while not model.idle():
        model.step()
    return seconds


def _growth_table(report: Mapping[str, Any]) -> Table:
    table = new_table("decoding steps")
    for column in ("positions", "step", "tokens/s"):
        table.add_column(column, justify="right")
    for row in report["results"]:
        cells = (
            f"{row['compute']}, {row['batch']} sequences",
            f"{row['context']}",
            seconds_text(row["seconds_per_step"]),
            f"{row['tokens_per_second']:,.0f}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=_counts, default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--context", type=_counts, default="128,256,512,1024,2048,4096,8192")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=core.available_cpus())
    options = parser.parse_args(arguments)
    check_new(options.json)
    check_new(options.plot)
    with Console(stderr=True).status("") as status:
        report = bench_growth(
            model=resolve_model(options.model),
            batches=options.batch,
            contexts=options.context,
            computes=[part.strip() for part in options.compute.split(",")],
            repeats=options.repeats,
            threads=options.threads,
            say=status.update,
        )
    write_json(options.json, report)
    Console().print(limits_text(report), _growth_table(report), memory_text(report), sep="\n")
    if options.plot is not None:
        growth_plot(report, options.plot)


if __name__ == "__main__":
    main()
