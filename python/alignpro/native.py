"""The one door to the compiled engine. Nothing else imports ``_core``.

The extension is loaded when a name is first asked for, so that what needs no engine (adapters on
disk, rewards) works without it, and a missing build is reported by whoever needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro import _core as core
    from alignpro._core import ModelFileError, NumericError, UnavailableError

__all__ = ["ModelFileError", "NumericError", "UnavailableError", "core"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    extension = _load()
    return extension if name == "core" else getattr(extension, name)


def _load() -> Any:
    try:
        return importlib.import_module("alignpro._core")
    except ModuleNotFoundError as error:
        if error.name != "alignpro._core":
            raise
        raise ImportError(
            "alignpro's compiled engine (alignpro._core) is not built for this Python; run "
            "`pip install .` in the repository, which needs a C++20 compiler"
        ) from None
    except ImportError as error:
        raise ImportError(
            f"alignpro's compiled engine does not load: {error}; rebuild it with `pip install .`"
        ) from error
