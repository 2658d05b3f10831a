"""One tiny native model for this room's tests; each must leave it idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignpro.models.native_model import NativeModel, load_model


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Callable[..., Path]) -> NativeModel:
    return load_model(tiny_model_dir("llama"), threads=2)


@pytest.fixture(autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("tiny", "smollm2"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name)._engine.idle()
