"""Ops of the engine that stand alone, as torch functions, for people who use nothing else here."""

from alignpro.ops.linear_logprob import (
    LinearLogprob,
    QuantizedWeight,
    get_num_threads,
    linear_logprob,
    peak_bytes,
    set_num_threads,
)

__all__ = [
    "LinearLogprob",
    "QuantizedWeight",
    "get_num_threads",
    "linear_logprob",
    "peak_bytes",
    "set_num_threads",
]
