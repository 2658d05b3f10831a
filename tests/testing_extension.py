"""`alignpro._testing`: ops that tests call one by one and no user does (tests/bindings)."""

from __future__ import annotations

import importlib
import unittest
from typing import Any


def load_testing() -> Any:
    """The extension. Where it is not built, a test that asks for it is skipped and says why."""
    try:
        return importlib.import_module("alignpro._testing")
    except ModuleNotFoundError as error:
        if error.name != "alignpro._testing":
            raise
        raise unittest.SkipTest(
            "alignpro._testing is not built; run pip install -c constraints.txt "
            "--config-settings=cmake.define.ALIGNPRO_TESTING=ON '.[test]'"
        ) from None
