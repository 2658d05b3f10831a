"""Importing a package that only some rewards need, with an error that says how to get it."""

from __future__ import annotations

import importlib
from typing import Any


def import_for(user: str, module: str, extra: str = "train") -> Any:
    """Imports ``module`` for the reward ``user``; ImportError names both and the remedy."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise  # the package is there and misses something of its own: that message is better
        raise ImportError(
            f"{user} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'alignpro[{extra}]'"
        ) from error
