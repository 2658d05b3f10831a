"""The C++ tree obeys its arrows, and each rule fails on a made-up violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from structure import cpp_rules

ROOT = Path(__file__).resolve().parents[2]


def tree(*folders: str, suffixes: tuple[str, ...] = (".h", ".cc", ".cu")) -> dict[str, str]:
    """Path relative to the root -> text."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    }


def test_includes_follow_the_arrows():
    files = tree("src/alignpro", "csrc/bindings", "csrc/cuda")
    assert len(files) > 20
    complaints = [
        c for path, text in files.items() for c in cpp_rules.include_complaints(path, text)
    ]
    assert complaints == []


def test_cmake_lists_every_source_by_name():
    folders = ("src/", "csrc/", "tests/bindings/")
    sources = tree(*folders, suffixes=(".cc", ".cu"))
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert cpp_rules.cmake_complaints(cmake, "", sources, folders) == []


def test_cmake_lists_every_cpp_test_by_name():
    sources = tree("tests/cpp", suffixes=(".cc",))
    cmake = (ROOT / "tests/cpp/CMakeLists.txt").read_text(encoding="utf-8")
    assert cpp_rules.cmake_complaints(cmake, "tests/cpp", sources, ("tests/cpp/",)) == []


def test_every_op_header_has_a_cpp_test():
    headers = [
        path for path in tree("src/alignpro/ops") if path.count("/") == 3 and path[-2:] == ".h"
    ]
    assert len(headers) > 5
    assert cpp_rules.untested_headers(headers, tree("tests/cpp")) == []


def test_every_header_is_guarded_by_pragma_once():
    # An "-inl.h" is a body that each instruction set's file includes into its own namespace.
    headers = tree("src", "csrc", "tests/bindings", "tests/cpp", suffixes=(".h",))
    unguarded = [path for path, text in headers.items() if "#pragma once" not in text]
    assert [path for path in unguarded if not path.endswith("-inl.h")] == []


@pytest.mark.parametrize(
    ("path", "line", "part"),
    [
        ("src/alignpro/core/rng.h", '#include "alignpro/io/gguf.h"', "higher layer io"),
        ("src/alignpro/ops/linear.cc", '#include "alignpro/model/model.h"', "higher layer model"),
        ("src/alignpro/ops/cpu/k.cc", '#include "alignpro/engine/engine.h"', "higher layer engine"),
        ("src/alignpro/model/model.cc", "#include <Python.h>", "foreign to model"),
        ("src/alignpro/model/model.cc", "#  include <pybind11/numpy.h>", "foreign to model"),
        ("src/alignpro/engine/engine.cc", "#include <torch/torch.h>", "foreign to engine"),
        ("src/alignpro/ops/linear.cc", "#include <cuda_runtime.h>", "foreign to ops"),
        ("src/alignpro/io/gguf.cc", "PyObject* object;", "names PyObject"),
        ("src/alignpro/io/gguf.cc", '#include "gguf.h"', "expected"),
        ("src/alignpro/io/gguf.cc", '#include "../core/rng.h"', "expected"),
        ("src/alignpro/extras/x.cc", "", "in no layer"),
        ("csrc/bindings/module.cc", "#include <torch/extension.h>", "foreign to bindings"),
        ("src/alignpro/model/model.cc", '#include "cuda/ops.h"', "foreign to model"),
        ("csrc/cuda/swiglu.cu", '#include "alignpro/model/model.h"', "higher layer model"),
        ("csrc/cuda/device_ops.cc", '#include "alignpro/model/layer.h"', "higher layer model"),
        ("csrc/cuda/device_ops.cc", '#include "alignpro/engine/engine.h"', "higher layer engine"),
        ("csrc/cuda/device_ops.cc", "#include <cuda_runtime.h>", "foreign to cuda"),
        ("csrc/cuda/device_ops.cc", "#include <pybind11/numpy.h>", "foreign to cuda"),
        ("csrc/cuda/swiglu.cu", "#include <torch/extension.h>", "foreign to cuda"),
        ("csrc/cuda/bodies/rows.h", "#include <cuda_runtime.h>", "foreign to cuda"),
    ],
)
def test_a_wrong_include_is_seen(path, line, part):
    complaints = cpp_rules.include_complaints(path, f"#pragma once\n{line}\n")
    assert len(complaints) == 1 and part in complaints[0]


def test_right_includes_and_comments_pass():
    text = """
    #include "alignpro/model/model.h"
    #include "alignpro/core/rng.h"
    #include <vector>
    // pybind11::gil_scoped_release is the caller's business; #include <Python.h>
    """
    assert cpp_rules.include_complaints("src/alignpro/engine/engine.cc", text) == []
    bindings = '#include <pybind11/pybind11.h>\n#include "alignpro/engine/engine.h"\n#include "c.h"'
    assert cpp_rules.include_complaints("csrc/bindings/module.cc", bindings) == []
    kernels = '#include <cuda_runtime.h>\n#include "alignpro/ops/kv_view.h"\n#include "launch.h"'
    assert cpp_rules.include_complaints("csrc/cuda/swiglu.cu", kernels) == []
    device = '#include "alignpro/ops/ops.h"\n#include "alignpro/core/error.h"\n#include "launch.h"'
    assert cpp_rules.include_complaints("csrc/cuda/device_ops.cc", device) == []


def test_a_source_missing_on_either_side_is_seen():
    cmake = "add_library(x STATIC src/a.cc src/b.cc # src/comment.cc\n)"
    complaints = cpp_rules.cmake_complaints(cmake, "", ["src/a.cc", "src/c.cc"], ("src/",))
    assert complaints == [
        "src/b.cc: listed in CMake, not in the tree",
        "src/c.cc: in the tree, not listed in CMake",
    ]
    globbed = cpp_rules.cmake_complaints("FILE (GLOB all src/*.cc)", "", [], ("lib/",))
    assert len(globbed) == 1 and "GLOB" in globbed[0]
    tests = cpp_rules.cmake_complaints("alignpro_test(a)\n", "t", ["t/a.cc", "t/b.cc"], ("t/",))
    assert tests == ["t/b.cc: in the tree, not listed in CMake"]


def test_an_untested_header_is_seen():
    tests = {
        "tests/cpp/a.cc": '#include "alignpro/ops/rope.h"\nswiglu(x);\n// linear(x)\nlinear_x();'
    }
    headers = [f"src/alignpro/ops/{name}.h" for name in ("rope", "swiglu", "linear")]
    complaints = cpp_rules.untested_headers(headers, tests)
    assert complaints == ["src/alignpro/ops/linear.h: no file under tests/cpp includes or names it"]
