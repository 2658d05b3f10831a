"""The rules for Python: who may import whom, read from the syntax tree of every file.

Imports inside functions and under TYPE_CHECKING count like any other: an arrow is an arrow.
Each rule is a function of file texts that returns complaints, so that it can be tried on made-up
violations as well as on the tree.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import PurePosixPath

PACKAGE = "alignpro"

# room -> the rooms it may import. A room may always import itself.
_BASE = {"config", "types"}
_SERVING = _BASE | {"native", "models"}
_WRITING = {"files", "run_directory", "optional", "interrupts"}
_RUNNING = (
    _SERVING
    | _WRITING
    | {"pipeline", "lengths", "rewards", "objective", "data", "statistics", "findings", "guards"}
    | {"fingerprints", "extract"}
)
ROOMS: dict[str, set[str]] = {
    "types": set(),
    "trace": set(),
    "files": set(),
    "optional": set(),
    "interrupts": set(),
    "run_directory": {"config", "files"},
    "config": {"types"},
    "data": _BASE | {"optional", "files"},
    "rewards": {"types", "optional", "models", "extract"},
    "extract": {"types", "models"},
    "objective": {"types"},
    "statistics": {"types"},
    "theory": {"types", "statistics"},
    "findings": _BASE | {"statistics", "guards"},
    "native": _BASE,
    "models": _BASE | {"native", "files", "trace"},
    "ops": _BASE | {"native"},
    "fingerprints": _BASE | {"models", "rewards.check", "files", "run_directory"},
    "pipeline": _SERVING | {"trace", "rewards.check", "extract"},
    "lengths": _BASE | {"models", "pipeline", "data", "rewards.check"},
    "trl": _BASE | {"models", "pipeline"},
    "guards": _BASE,
    "rewriting": _BASE | {"models", "pipeline", "guards", "trace"},
    "prompter": _BASE | {"models", "pipeline", "rewriting", "run_directory"},
    "serve": _BASE | {"models", "prompter", "rewriting", "optional", "trace"},
    "train": _RUNNING | {"theory"},
    "evaluate": _RUNNING | {"theory", "train.metrics"},
    "report": _RUNNING | {"theory", "train", "evaluate"},
    "quickstart": _RUNNING | {"train", "evaluate", "report", "bench.machine"},
    "bench": _RUNNING | {"trace", "train", "prompter", "serve"},
    "price": _SERVING
    | {
        "data",
        "bench.machine",
        "train.micro_batches",
        "train.policy",
        "train.preference",
        "train.schedule",
        "train.sft",
    },
    "cli": _RUNNING
    | {"train", "evaluate", "report", "quickstart", "bench", "price"}
    | {"theory", "prompter", "serve"},
    "__main__": {"cli"},
    "": _RUNNING | {"ops", "prompter", "rewriting", "train", "evaluate", "report"},  # public names
}

# module of others -> the rooms or modules that may import it
ONLY = {
    "transformers": {"rewards"},  # loads reward models
    "torch": {"objective", "ops", "train", "rewards"},
    "httpx2": {"models"},  # calls to endpoints
    **{
        name: {"serve"}
        for name in ("starlette", "uvicorn", "aiohttp", "http.server", "socketserver")
    },
    "alignpro._core": {"native"},
}
STANDARD_LIBRARY_ONLY = {
    *("config", "types", "trace", "files", "optional", "interrupts", "run_directory", ""),
}
# The one module of config that needs more says so by its import.
EXCEPTIONS = {("config", "yaml")}

LINE_LIMIT = 500
REASON = "Long because"


@dataclass(frozen=True)
class Import:
    """One imported module, absolute; ``names`` are those of a from-import."""

    module: str
    names: tuple[str, ...]
    line: int


def module_of(path: str) -> str:
    """ "python/alignpro/rewards/check.py" -> "rewards.check"; the package's own __init__ -> ""."""
    parts = PurePosixPath(path).with_suffix("").parts
    inner = parts[parts.index(PACKAGE) + 1 :]
    return ".".join(inner[:-1] if inner[-1] == "__init__" else inner)


def imports(text: str, path: str) -> list[Import]:
    """Every import statement and every importlib.import_module of a constant name."""
    inside = PurePosixPath(path).parts
    package = inside[inside.index(PACKAGE) : -1]  # of the file, for relative imports
    found = []
    for node in ast.walk(ast.parse(text, filename=path)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            found.append(Import(module, tuple(a.name for a in node.names), node.lineno))
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            first = node.args[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                dots = len(first.value) - len(first.value.lstrip("."))
                base = package[: len(package) - dots + 1] if dots else ()
                found.append(Import(".".join((*base, first.value[dots:])), (), node.lineno))
    return found


def _targets(imported: Import) -> list[str]:
    """Modules an import may bind: "from alignpro import native" is an import of alignpro.native."""
    if imported.module == PACKAGE and imported.names:
        return [f"{PACKAGE}.{name}" for name in imported.names]
    if (
        imported.names
        and imported.module.startswith(f"{PACKAGE}.")
        and imported.module.count(".") == 1
    ):
        # from alignpro.rewards import check: the room and perhaps one module of it
        return [f"{imported.module}.{name}" for name in imported.names]
    return [imported.module]


def import_complaints(path: str, text: str) -> list[str]:
    """Imports of one file of the package that run against the arrows."""
    module = module_of(path)
    room = module.split(".")[0]
    if room not in ROOMS:
        return [f"{path}: {room!r} is no room of the house; expected one of {sorted(ROOMS)}"]
    complaints = []
    for imported in imports(text, path):
        where = f"{path}:{imported.line}"
        for target in _targets(imported):
            complaints += [
                f"{where}: only {sorted(allowed)} may import {name}"
                for name, allowed in ONLY.items()
                if (target == name or target.startswith(name + ".")) and room not in allowed
            ]
            top, _, rest = target.partition(".")
            if top == PACKAGE:
                complaints += _room_complaints(where, room, rest)
            elif (
                room in STANDARD_LIBRARY_ONLY
                and top not in sys.stdlib_module_names
                and (room, top) not in EXCEPTIONS
            ):
                complaints.append(
                    f"{where}: {room or '__init__'} is standard library only, got {top}"
                )
    return complaints


def _room_complaints(where: str, room: str, target: str) -> list[str]:
    """``target`` is "room", "room.module" or "room.module.name" inside the package."""
    other = target.split(".")[0]
    allowed = ROOMS[room]
    if other in ("", "_core", "__version__", room) or other in allowed:
        return []
    if any("." in a and (target + ".").startswith(a + ".") for a in allowed):
        return []
    return [f"{where}: {room or '__init__'} may not import {target}; it may name {sorted(allowed)}"]


def length_complaints(path: str, text: str) -> list[str]:
    """A file over the limit owes a reason near its top."""
    lines = text.splitlines()
    if len(lines) <= LINE_LIMIT or any(REASON in line for line in lines[:40]):
        return []
    return [f'{path}: {len(lines)} lines; split it, or say "{REASON} ..." in its first 40 lines']
