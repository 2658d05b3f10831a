"""The GPU's cases on small shapes, through the bindings, where the device is emulated."""

from __future__ import annotations

import pytest
import torch

from alignpro import native
from gpu import calls, cases, gradient_cases, model_cases  # noqa: F401


def test_it_says_that_it_is_emulated():
    cuda = native.core.cuda
    assert cuda.version() == native.core.build_info()["cuda"] == "emulated"
    assert "emulated" in cuda.device_name()
    assert "_core_emulated" in str(native.core.__file__)
    assert calls.DEVICE == "cpu"


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_case(case):
    torch.manual_seed(7)
    measured = case()
    assert measured and [m for m in measured if not m[1] <= m[2]] == []


# Arguments of two dimensions that an op reads as one run of memory, by their places.
DENSE = {
    "rope_kv_write": {2: "cos", 3: "sin"},
    "rope_backward": {2: "cos", 3: "sin"},
    "kv_copy": {0: "copies"},
    "attention_prefill": {2: "segments", 7: "lse"},
    "attention_backward": {4: "lse", 5: "segments"},
    "head_sample": {2: "rows"},
}


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, rows lying apart; what lies between them is NaN, or -1."""
    between = float("nan") if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 255
    wide = torch.full((len(tensor), tensor.shape[1] + 16), between, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


class PaddedOps:
    """The ops on matrices whose rows lie apart, each tried with the dense ones padded as well."""

    def __init__(self, ops: object) -> None:
        self._ops, self.refused = ops, set()

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        op = getattr(self._ops, name)
        if name.endswith("_bytes") or name == "AttentionShape":
            return op

        def call(*arguments):  # type: ignore[no-untyped-def]
            dense = DENSE.get(name, {})
            wide: dict[int, torch.Tensor] = {}
            given = list(arguments)
            for at, value in enumerate(arguments):
                if isinstance(value, torch.Tensor) and value.dim() == 2 and len(value) > 1:
                    if at in dense:
                        with pytest.raises(ValueError, match=f"{dense[at]}: expected contiguous"):
                            op(*arguments[:at], padded(value), *arguments[at + 1 :])
                        self.refused.add((name, dense[at]))
                    else:
                        given[at] = wide.setdefault(id(value), padded(value))
            op(*given)
            for value in arguments:
                if id(value) in wide:
                    rows = wide[id(value)]
                    between = rows.as_strided((len(rows), 16), rows.stride(), rows.shape[1])
                    assert between.isnan().all() or (between == -1).all(), name
                    value.copy_(rows)

        return call


# The models' cases make no call of an op.
OPS = [case for case in cases.CASES if not case.__name__.startswith("model")]


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.__name__)
def test_rows_that_lie_apart_are_honoured_or_refused(case, monkeypatch):
    ops = PaddedOps(calls.cuda)
    monkeypatch.setattr(calls, "cuda", ops)
    torch.manual_seed(7)
    assert [m for m in case() if not m[1] <= m[2]] == []
    assert ops.refused >= {(case.__name__, name) for name in DENSE.get(case.__name__, {}).values()}


def test_without_columns_there_is_nothing_to_multiply():
    ids = torch.tensor([0, 1], dtype=torch.int32)
    op = calls.LinearLogprob(torch.zeros(2, 0), torch.zeros(5, 0), ids)
    with pytest.raises(ValueError, match="hidden: expected rows of a multiple of 4 values, got 0"):
        op.forward()
    op = calls.LinearLogprob(
        torch.ones(2, 4), torch.ones(5, 4), ids, 1.0, torch.zeros(2, 0), torch.zeros(5, 0)
    )
    with pytest.raises(ValueError, match="reference_hidden: expected rows of a multiple of 4"):
        op.forward()


def test_a_tensor_of_another_device_or_type_is_refused():
    meta = torch.empty(2, 8, device="meta")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError, BufferError)):
        calls.rms_norm(meta, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="x: expected float32 or bfloat16, got type code 2 of 64"):
        calls.rms_norm(torch.ones(2, 8, dtype=torch.float64), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="weight: expected 8 values of F32, got 4"):
        calls.rms_norm(torch.ones(2, 8), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="x: expected contiguous memory"):
        calls.rms_norm(torch.ones(8, 16).T, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="rows of a multiple of 4 values, got 6"):
        calls.rms_norm(torch.ones(2, 6), torch.ones(6), 1e-5)
