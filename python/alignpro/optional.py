"""Packages that only some uses need: imported then, or an error that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def import_for(user: str, module: str, requirement: str = "alignpro[train]") -> Any:
    """Imports ``module`` for ``user``; ImportError names both and what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise  # the package is there and misses something of its own: that message is better
        raise ImportError(
            f"{user} needs the package {package!r}, which is not installed; "
            f"install it with: pip install '{requirement}'"
        ) from error


def is_installed(module: str) -> bool:
    """Whether it can be imported; nothing is."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # an import hook hides it
        return False
