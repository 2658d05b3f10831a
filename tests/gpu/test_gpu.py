"""The GPU's cases under pytest; skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest

from alignpro import native

CASES = (
    "embedding",
    "soft_rows",
    "mix_rows",
    "rms_norm",
    "rms_norm_add",
    "swiglu",
    "geglu",
    "linear",
    "qk_norm",
    "rope_kv_write",
    "kv_copy",
    "attention_decode",
    "attention_prefill",
    "linear_logprob",
    "linear_logprob_at_the_edges",
    "linear_logprob_backward",
    "head_sample",
    "head_sample_truncated",
    "embedding_backward",
    "rms_norm_backward",
    "qk_norm_backward",
    "swiglu_backward",
    "geglu_backward",
    "rope_backward",
    "linear_backward",
    "attention_backward",
    "model_generates",
    "model_gradients",
    "model_fast",
)


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    if not native.core.cuda.is_available():
        pytest.skip(f"GPU: {native.core.cuda.unavailable_reason()}")
    from gpu import cases, gradient_cases, model_cases  # noqa: F401

    (case,) = (c for c in cases.CASES if c.__name__ == name)
    assert [m for m in case() if not m[1] <= m[2]] == []


def test_every_case_is_named():
    from gpu import cases, gradient_cases, model_cases  # noqa: F401

    assert tuple(c.__name__ for c in cases.CASES) == CASES
