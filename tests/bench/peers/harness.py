"""What the peer scripts share: the request, the clock, the memory meter, the report.

A script is run by peers.py as ``python run_NAME.py REQUEST REPORT``: the request as JSON, and the
file that the report goes to, written anew after every case so that a crash loses one case only.
Needs numpy and the standard library; of alignpro it reads modules that need no more than these.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "python"))

from alignpro.bench.work import random_prompts

_SETTLE_SECONDS = 0.02  # as between the calls of ours


@dataclass(frozen=True)
class Case:
    """Sequences at once, the length of their prompts, and how much each of them writes."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Request:
    """What peers.py asks of a script. The sizes come from the report of our own run."""

    benchmark: str  # decode, prefill, rollout or step
    model: str  # a GGUF file or a folder: what this peer reads
    threads: int
    repeats: int  # counted, after one to warm up
    variant: str = ""  # of the peer: the arithmetic
    vocab_size: int = 0
    cases: tuple[Case, ...] = ()  # of decode and prefill
    prompts: int = 0  # of rollout

    @classmethod
    def from_json(cls, text: str) -> Request:
        fields = json.loads(text)
        fields["cases"] = tuple(Case(**case) for case in fields["cases"])
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(case.prompt_tokens + case.new_tokens for case in self.cases)

    @property
    def widest(self) -> int:
        """Sequences of the largest batch."""
        return max(case.batch for case in self.cases)


class Written(NamedTuple):
    """New tokens of every sequence and, where the peer has them, their log-probabilities."""

    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]] | None  # or one sum or mean for each sequence


# (prompts, new tokens of each, seed): temperature 1, no end, nothing remembered between calls.
Generate = Callable[[list[list[int]], int, int], Written]


def chat_inputs(tokenizer: Any, turns: Sequence[str]) -> Any:
    """One user turn each in the chat template, as tensors padded on the left.

    The side is set on the tokenizer: as an argument of `apply_chat_template` it is passed over,
    and what is written after right padding is not an answer.
    """
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": turn}] for turn in turns],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    if not bool(inputs["attention_mask"][:, -1].all()):
        raise RuntimeError("chats: expected padding on the left, got it on the right")
    return inputs


def generation(package: str, load: Callable[[Request], Generate]) -> None:
    """The script of a peer that generates from token ids: decode and prefill."""
    request, report = start(package)
    generate, report["load_seconds"] = timed(lambda: load(request))
    for case in request.cases:
        row = dataclasses.asdict(case)
        try:
            row |= _measured(generate, case, request)
        except Exception as error:  # the cases after it are run all the same
            row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
        report["results"].append(row)
        write(report)


def start(package: str) -> tuple[Request, dict[str, Any]]:
    """The request of this process, and a report without results."""
    request = Request.from_json(sys.argv[1])
    return request, {
        "benchmark": request.benchmark,
        "version": metadata.version(package),
        "python": platform.python_version(),
        "results": [],
    }


def write(report: dict[str, Any]) -> None:
    """The report as far as it is known."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report["peak_rss_bytes"] = max(one.ru_maxrss for one in usage) * 1024
    Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the call returns, and its seconds."""
    gc.collect()
    time.sleep(_SETTLE_SECONDS)
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _measured(generate: Generate, case: Case, request: Request) -> dict[str, Any]:
    prompts = random_prompts(request.vocab_size, case.batch, case.prompt_tokens)
    seconds = []
    for seed in range(request.repeats + 1):
        written, took = timed(lambda seed=seed: generate(prompts, case.new_tokens, seed))
        check(written, case, request.vocab_size)
        seconds.append(took)
    return {
        "all_seconds": seconds[1:],
        "seconds": statistics.median(seconds[1:]),
        "logprobs": written.logprobs is not None,
    }


def check(written: Written, case: Case, vocab_size: int) -> None:
    """Refuses work that is not the work asked for.

    Raises:
        ValueError: lengths, token ids or log-probabilities.
    """
    lengths = [len(tokens) for tokens in written.tokens]
    if lengths != [case.new_tokens] * case.batch:
        raise ValueError(f"expected {case.batch} x {case.new_tokens} tokens, got {lengths}")
    if not all(0 <= token < vocab_size for tokens in written.tokens for token in tokens):
        raise ValueError(f"a token outside the vocabulary of {vocab_size}")
    if case.batch > 1 and case.new_tokens > 4 and len({tuple(t) for t in written.tokens}) == 1:
        raise ValueError("every sequence is the same: nothing was drawn")
    if written.logprobs is None:
        return
    if len(written.logprobs) != case.batch:
        raise ValueError(f"expected log-probabilities of {case.batch}, got {len(written.logprobs)}")
    for values in written.logprobs:
        if not all(math.isfinite(value) and value <= 1e-4 for value in values):
            raise ValueError("a log-probability that is none")
    if not any(value for values in written.logprobs for value in values):
        raise ValueError("every log-probability is 0: they were not computed")
