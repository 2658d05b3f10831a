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
