"""These tests run on an engine whose CUDA device is emulated by the CPU: ALIGNPRO_EMULATED_CORE
names the extension that CMake builds as _core_emulated (-DALIGNPRO_TESTS=ON -DALIGNPRO_PYTHON=ON).
It takes the place of ``alignpro._core`` in this process, so they run in one of their own; elsewhere
they are skipped."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

CORE = os.environ.get("ALIGNPRO_EMULATED_CORE")

if CORE is not None:
    if "alignpro._core" in sys.modules:
        raise RuntimeError("ALIGNPRO_EMULATED_CORE: run tests/emulated alone, without other tests")
    spec = importlib.util.spec_from_file_location("alignpro._core", CORE)
    assert spec is not None and spec.loader is not None, CORE
    sys.modules["alignpro._core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["alignpro._core"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    if CORE is None:
        skip = pytest.mark.skip(reason="emulated CUDA: ALIGNPRO_EMULATED_CORE names no extension")
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(skip)
