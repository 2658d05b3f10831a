"""The rules for C++: who may include whom, and that CMake lists every source by name.

Each rule is a function of file texts that returns complaints, so that it can be tried on made-up
violations as well as on the tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

# Lower layers first; a layer may include itself and what stands before it. csrc/cuda implements
# ops: it knows core, io and ops, and no model. src knows nothing of csrc (FOREIGN_TO_SRC).
LAYERS = ("core", "io", "ops", "cuda", "model", "engine", "prompter", "bindings")
OUTER = ("cuda", "bindings")  # in csrc

FOREIGN_TO_SRC = re.compile(
    r"^(Python\.h|pybind11/|torch/|ATen/|c10/|cuda|cublas|cudnn|cooperative_groups|nvrtc|dlpack/)"
)
FOREIGN_TO_BINDINGS = re.compile(r"^(torch/|ATen/|c10/)")
FOREIGN_TO_CUDA = re.compile(r"^(Python\.h|pybind11/|torch/|ATen/|c10/)")
# In csrc/cuda, what may name the runtime: callers and the C++ tests compile the rest without it.
NAMES_CUDA = re.compile(r"(\.cu|/launch\.h|/device_block\.h|/hopper\.h)$")
# A foreign runtime named without an include of its own.
FOREIGN_WORDS = re.compile(r"\b(pybind11::|PyObject\b|Py_\w+|at::Tensor|torch::|cudaStream_t)")

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
CMAKE_SOURCE = re.compile(r"[\w./-]+\.(?:cc|cu)\b")


def includes(text: str) -> list[tuple[str, bool]]:
    """(path, quoted) of every include."""
    return [(q or a, bool(q)) for q, a in INCLUDE.findall(COMMENT.sub("", text))]


def layer_of(path: str) -> str | None:
    """The layer that owns a file ("src/alignpro/ops/x.h") or an include ("alignpro/ops/x.h")."""
    parts = PurePosixPath(path).parts
    if parts[:2] == ("csrc", "bindings"):
        return "bindings"
    parts = parts[1:] if parts[:2] == ("csrc", "cuda") else parts
    if parts[:1] == ("cuda",):
        return "cuda"
    parts = parts[1:] if parts[:1] == ("src",) else parts
    return parts[1] if len(parts) > 2 and parts[0] == "alignpro" and parts[1] in LAYERS else None


def include_complaints(path: str, text: str) -> list[str]:
    """Includes of one file that run against the arrows."""
    own = layer_of(path)
    if own is None:
        rooms = ",".join(layer for layer in LAYERS if layer not in OUTER)
        return [f"{path}: in no layer; expected src/alignpro/{{{rooms}}}/"]
    complaints = []
    foreign = {"bindings": FOREIGN_TO_BINDINGS, "cuda": FOREIGN_TO_CUDA}.get(own, FOREIGN_TO_SRC)
    if own == "cuda" and not NAMES_CUDA.search(path):
        foreign = FOREIGN_TO_SRC
    for name, quoted in includes(text):
        if foreign.match(name):
            complaints.append(f"{path}: includes <{name}>, a runtime foreign to {own}")
        if not quoted:
            continue
        other = layer_of(name)
        if other is None:
            if own not in OUTER:
                complaints.append(f'{path}: expected "alignpro/<layer>/...", got "{name}"')
        elif LAYERS.index(other) > LAYERS.index(own):
            complaints.append(f"{path}: {own} includes {name} of the higher layer {other}")
    if own not in OUTER:
        words = sorted(set(FOREIGN_WORDS.findall(COMMENT.sub("", text))))
        complaints += [f"{path}: names {word}, a runtime foreign to {own}" for word in words]
    return complaints


def cmake_complaints(
    cmake: str, folder: str, existing: Iterable[str], roots: tuple[str, ...]
) -> list[str]:
    """Sources that CMake lists and are not there, and the other way round.

    Args:
        folder: where the CMakeLists.txt stands, "" for the root: paths in it are relative to this.
        existing: paths of all sources in the tree. roots: the folders this file answers for.
    """
    code = re.sub(r"#[^\n]*", "", cmake)
    prefix = f"{folder}/" if folder else ""
    listed = {prefix + name for name in CMAKE_SOURCE.findall(code)}
    listed |= {
        f"{prefix}{name}.cc" for name in re.findall(r"^alignpro_test\((\w+)\)", code, re.MULTILINE)
    }
    listed = {name for name in listed if name.startswith(roots)}
    there = {name for name in existing if name.startswith(roots)}
    complaints = [f"{name}: listed in CMake, not in the tree" for name in sorted(listed - there)]
    complaints += [f"{name}: in the tree, not listed in CMake" for name in sorted(there - listed)]
    if re.search(r"file\s*\(\s*GLOB", code, re.IGNORECASE):
        complaints.append(f"{prefix}CMakeLists.txt: sources are listed by name, found file(GLOB")
    return complaints


def untested_headers(headers: Iterable[str], tests: Mapping[str, str]) -> list[str]:
    """Op headers that no C++ test includes or names (an op has one name everywhere)."""
    included = {name for text in tests.values() for name, quoted in includes(text) if quoted}
    words = {w for text in tests.values() for w in re.findall(r"\w+", COMMENT.sub("", text))}
    return [
        f"{header}: no file under tests/cpp includes or names it"
        for header in headers
        if header.removeprefix("src/") not in included and PurePosixPath(header).stem not in words
    ]
