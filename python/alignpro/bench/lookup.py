"""`alignpro bench lookup`: one request at a time, with drafts that are looked up and without."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignpro.bench.generation import Say, open_report
from alignpro.bench.machine import peak_rss_bytes, percentiles
from alignpro.bench.work import ROLLOUT, random_prompts
from alignpro.config import REWRITE, Prompting
from alignpro.data.load import load_prompts
from alignpro.models.native_model import NativeModel, load_model
from alignpro.types import Completion, Message, SamplingParams

_COPYING = Prompting(mode="rewrite", template="Repeat this text, word for word.\n\n{prompt}")
_GREEDY = replace(REWRITE, temperature=0.0)


@dataclass(frozen=True)
class _Case:
    """Requests of one kind, and how long prompt (less its template) and rewrite are.

    ``examples`` are earlier turns that are answered by the user's own text: even a small model
    that was never trained for it then copies its prompt.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    params: SamplingParams
    prompting: Prompting | None  # None: random tokens, of which nothing can be copied
    examples: int = 0


_CASES = (
    _Case("copied", 48, 48, _GREEDY, _COPYING, examples=2),
    _Case("asked again", 48, 48, _GREEDY, _COPYING, examples=2),  # the same requests
    _Case("instruction", 40, 12, REWRITE, Prompting()),
    _Case("random prompt", 40, 48, replace(REWRITE, temperature=1.0), None),
)


def bench_lookup(
    *,
    model: Path,
    requests: int = 24,
    threads: int,
    compute: str = "float32",
    kv_dtype: str = "float32",
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Seconds of single requests, p50 and p99, by two engines in turn: ``lookup`` and ``plain``.

    Prompts are pieces of the everyday set's, each asked once: "copied" is written greedily behind
    instructions to repeat them, and "asked again" are the same requests once more; "instruction"
    is what a prompter writes as training begins; "random prompt" has nothing to copy, and shows
    what drafts cost in vain. Shared beginnings of prompts are computed before, as when serving.
    ``speedup`` is of the medians; ``bit_equal`` whether tokens and log-probabilities were the same.
    """
    options: dict[str, Any] = {"compute": compute, "kv_dtype": kv_dtype, "prefix_cache": True}
    drafting, report = open_report("lookup", model, threads, 3, lookup=True, **options)
    engines = {
        "plain": load_model(model, threads=threads, lookup=False, **options),
        "lookup": drafting,
    }
    report |= {"requests": requests, "results": []}
    for case in _CASES:
        say(case.name)
        prompts = _prompts(case, drafting, requests + 1)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        before = drafting.stats()
        equal = True
        for number, prompt in enumerate(prompts):
            params = replace(
                case.params, max_new_tokens=case.new_tokens, seed=number, ignore_eos=True
            )
            written: list[Completion] = []
            for name, engine in engines.items():
                started = time.perf_counter()
                written += engine.generate([prompt], params)
                seconds[name].append(time.perf_counter() - started)
            equal = equal and written[0] == written[1]
            if number == 0:  # the template's KV is there from now on
                before = drafting.stats()
                seconds = {name: [] for name in engines}
        counts = {name: drafting.stats()[name] - before[name] for name in before}
        found = {name: percentiles(values) for name, values in seconds.items()}
        report["results"].append(
            {
                "case": case.name,
                "prompt_tokens": sum(map(len, prompts[1:])) / requests,
                "new_tokens": case.new_tokens,
                **found,
                "speedup": found["plain"]["p50"] / found["lookup"]["p50"],
                "drafted_share": counts["drafted_tokens"] / counts["decode_tokens"],
                "accepted_share": counts["accepted_tokens"] / counts["decode_tokens"],
                "steps": counts["steps"] / requests,
                "bit_equal": equal,
                "all_seconds": seconds,
            }
        )
    report["peak_rss_bytes"] = peak_rss_bytes()
    return report


def _prompts(case: _Case, model: NativeModel, count: int) -> list[list[int]]:
    """Distinct prompts; alike for all cases of one kind."""
    if case.prompting is None:
        return random_prompts(model.config["vocab_size"], count, case.prompt_tokens)
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    tokens = encode(" ".join(str(row.prompt) for row in load_prompts(ROLLOUT.data)))
    most = len(tokens) // case.prompt_tokens - case.examples
    if count > most:
        raise ValueError(f"requests: expected at most {most - 1}, got {count - 1}")
    pieces = [
        decode(tokens[at : at + case.prompt_tokens]).strip()
        for at in range(0, (case.examples + count) * case.prompt_tokens, case.prompt_tokens)
    ]
    turns = [case.prompting.prompter_turns(piece)[0] for piece in pieces]
    shown: list[Message] = []
    for turn, piece in zip(turns[: case.examples], pieces, strict=False):
        shown += [{"role": "user", "content": turn}, {"role": "assistant", "content": piece}]
    return [
        model.tokenizer.encode_chat([*shown, {"role": "user", "content": turn}])
        for turn in turns[case.examples :]
    ]
