"""The C++ package: examples/cpp built on an installed tree, against Python's Prompter.

ALIGNPRO_CPP_PREFIX names where ``cmake --install BUILD --component cpp`` put it.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import alignpro
from alignpro.config import REWRITE
from alignpro.models.prompter_file import save_prompter
from native_runs import lora

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
PREFIX = os.environ.get("ALIGNPRO_CPP_PREFIX")
PROMPTS = ["How do bees find home?", "  12 caf\u00e9s <|im_end|> it's  ", "x"]
PROMPTING = alignpro.Prompting(template="Say how: {prompt}", separator=" | ")

pytestmark = pytest.mark.skipif(
    PREFIX is None, reason="C++ package: ALIGNPRO_CPP_PREFIX names no installed tree"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", EXAMPLE, "-B", build, f"-DCMAKE_PREFIX_PATH={PREFIX}"]
    for command in (configure, ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return build / "rewrite"


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """(folder, Python's prompter) of a random adapter, which changes what is written."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    params = replace(REWRITE, stop=(" of",), top_p=0.95)
    weights = lora(smollm2)
    weights.alpha = 0.2
    save_prompter(folder, weights, smollm2.tokenizer, PROMPTING, params)
    return folder, alignpro.Prompter(smollm2, folder, prompting=PROMPTING, params=params)


def rewritten(program, *arguments, prompts=PROMPTS):
    """(prompts to ask, reasons)"""
    command = [program, *map(str, arguments)]
    ran = subprocess.run(command, input="\n".join(prompts), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, [line.split()[0] for line in ran.stderr.splitlines()]


def test_it_writes_what_python_writes(program, adapter, smollm2):
    folder, prompter = adapter
    for seed in range(4):
        expected = [prompter.rewrite(prompt, seed=seed) for prompt in PROMPTS]
        out, reasons = rewritten(program, smollm2.path, folder, 60_000, seed)
        assert out == "".join(f"{result.prompt}\n" for result in expected)
        assert reasons == [result.reason for result in expected]
        assert any(result.applied for result in expected)
    bare = alignpro.Prompter(smollm2, prompting=PROMPTING, params=prompter._pipeline.rewrite_params)
    assert bare.rewrite(PROMPTS[0], seed=0).text != prompter.rewrite(PROMPTS[0], seed=0).text


def test_after_the_deadline_the_prompt_goes_out_as_it_is(program, adapter, smollm2):
    out, reasons = rewritten(program, smollm2.path, adapter[0], 1)
    assert out.splitlines() == PROMPTS and reasons == ["deadline"] * 3


def test_what_it_cannot_read_is_refused_by_name(program, adapter, smollm2, tmp_path):
    def error(*arguments):
        command = [program, *map(str, arguments), "100"]
        ran = subprocess.run(command, input="a", capture_output=True, text=True)
        assert ran.returncode == 1
        return ran.stderr

    assert "prompter.json: no such file" in error(smollm2.path, tmp_path)
    assert "expected a GGUF file" in error(tmp_path, adapter[0])
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    for name in ("prompter.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter[0] / name).read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora is set" in error(smollm2.path, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    assert "expected shape [3, " in error(smollm2.path, tmp_path)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "mixture.json").write_text('{"members": {"base": 1}}')
    assert "a mixture of adapters" in error(smollm2.path, mixed)


def test_as_a_part_of_another_project_it_is_the_library_alone(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        "project(program LANGUAGES CXX)\n"
        f"add_subdirectory({EXAMPLE.parents[1]} alignpro)\n"
        f"add_executable(program {EXAMPLE / 'rewrite.cc'})\n"
        "target_link_libraries(program PRIVATE alignpro::alignpro)\n"
    )
    build = tmp_path / "build"
    configure = ["cmake", "-S", tmp_path, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(
        [*configure, "-DALIGNPRO_WERROR=ON", "-DCMAKE_CXX_FLAGS=-Wconversion"],
        check=True,
        capture_output=True,
    )
    commands = {
        Path(one["file"]).name: one["command"]
        for one in json.loads((build / "compile_commands.json").read_text())
    }
    assert "module.cc" not in commands and "no_cuda.cc" in commands
    of_program = commands["rewrite.cc"].split()
    ours = [flag for flag in of_program if flag.startswith(("-W", "-f", "-m"))]
    assert ours == ["-Wconversion"] and "-Wshadow" in commands["engine.cc"]
    # Headers are read with the program's own warnings.
    strict = [flag for flag in of_program if flag.startswith(("-I", "-std"))]
    strict += ["-Wall", "-Wextra", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror"]
    subprocess.run(["c++", "-fsyntax-only", *strict, EXAMPLE / "rewrite.cc"], check=True)
