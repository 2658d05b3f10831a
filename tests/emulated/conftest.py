"""These tests run on an engine whose CUDA device is emulated by the CPU: ALIGNPRO_EMULATED_CORE
names the extension that CMake builds as _core_emulated (-DALIGNPRO_TESTS=ON -DALIGNPRO_PYTHON=ON),
_testing_emulated beside it. They take the places of ``alignpro._core`` and ``alignpro._testing`` in
this process, so these tests run in one of their own; elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

CORE = os.environ.get("ALIGNPRO_EMULATED_CORE")

if CORE is not None:
    if "alignpro._core" in sys.modules:
        raise RuntimeError("ALIGNPRO_EMULATED_CORE: run tests/emulated alone, without other tests")
    for name in ("_core", "_testing"):
        path = CORE.replace("_core_emulated", f"{name}_emulated")
        spec = importlib.util.spec_from_file_location(f"alignpro.{name}", path)
        assert spec is not None and spec.loader is not None, path
        sys.modules[f"alignpro.{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[f"alignpro.{name}"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    if CORE is None:
        skip = pytest.mark.skip(reason="emulated CUDA: ALIGNPRO_EMULATED_CORE names no extension")
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(skip)
