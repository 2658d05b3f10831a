"""The CUDA engine where there is none: honest, and every op says what to do."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from alignpro import native
from testing_extension import load_testing

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import check_spills  # noqa: E402

LOGPROB = "hidden weight tokens temperature reference_hidden reference_weight forward "
CALLS = {
    "embedding": "table tokens scale out stream",
    "soft_rows": "soft tokens out stream",
    "mix_rows": "x begins rows weights out stream",
    "rms_norm": "x weight eps y stream",
    "rms_norm_add": "x weight eps residual y stream",
    "swiglu": "gate_up h stream",
    "geglu": "gate_up h stream",
    "linear": "x weight bias residual lora_x lora_up lora_scale out stream",
    "qk_norm": "qkv shape q_weight k_weight eps stream",
    "rope_kv_write": "qkv shape cos sin positions blocks kv stream",
    "kv_copy": "copies shape kv stream",
    "attention_decode": ("qkv shape positions block_table max_positions kv workspace out stream"),
    "attention_prefill": "qkv shape segments max_rows block_table kv out lse stream",
    "embedding_backward": "d_out begins places d_table stream",
    "qk_norm_backward": "qkv shape q_weight k_weight eps d_qkv stream",
    "rms_norm_backward": "x weight eps dy dx stream",
    "swiglu_backward": "gate_up dh d_gate_up stream",
    "geglu_backward": "gate_up dh d_gate_up stream",
    "rope_backward": "d_qkv shape cos sin positions stream",
    "linear_backward": "dy weight residual lora_down lora_up lora_scale d_low dx stream",
    "lora_backward": "x lora_x dy d_low lora_scale d_a d_b workspace stream",
    "attention_backward": (
        "qkv shape out dout lse segments max_rows child_begin children block_table kv d_qkv "
        "workspace stream"
    ),
    "linear_logprob": LOGPROB + "workspace stream",
    "total_variation": LOGPROB + "total_variation mass_above workspace stream",
    "linear_logprob_backward": LOGPROB + "upstream d_hidden d_weight workspace stream",
    "head_sample": "hidden head rows tokens logprobs banned kept_mass workspace stream",
}


def arguments(op: str) -> dict[str, object]:
    """No tensors, and values of the right type for the rest."""
    typed: dict[str, object] = {
        "eps": 1e-5,
        "temperature": 1.0,
        "lora_scale": 1.0,
        "stream": 0,
        "max_positions": 16,
        "max_rows": 16,
        "forward": {},
        "upstream": {},
        "shape": load_testing().AttentionShape(2, 1, 8, 0, 1.0),
    }
    return {name: typed.get(name) for name in CALLS[op].split()}


@pytest.mark.parametrize("op", CALLS)
def test_without_a_gpu_a_call_says_so(op):
    cuda, testing = native.core.cuda, load_testing()
    if cuda.is_available():
        pytest.skip(f"{cuda.device_name()} is here")
    with pytest.raises(native.UnavailableError, match=r"^cuda: ") as caught:
        getattr(testing, op)(**arguments(op))
    assert "\n" not in str(caught.value)
    assert cuda.unavailable_reason() in str(caught.value)


def test_every_op_is_called():
    ops = {name for name in vars(load_testing()) if not name.startswith("__")}
    of_prompters = {"Guards", "Prompter", "Tokenizer", "answer_of", "broken_guard"}
    others = {"AttentionShape", "prompter_turns", "split_words", *of_prompters}  # which are no ops
    assert {name for name in ops if not name.endswith("_bytes")} - others == set(CALLS)


def test_without_a_gpu_the_device_says_so():
    cuda = native.core.cuda
    if cuda.is_available():
        assert cuda.unavailable_reason() == ""
        pytest.skip(f"{cuda.device_name()} is here")
    with pytest.raises(native.UnavailableError, match=r"^cuda: "):
        cuda.device_name()
    wanted = "ALIGNPRO_CUDA=ON" if cuda.version() == "no" else "GPU"
    assert wanted in cuda.unavailable_reason()


def test_a_build_without_cuda_links_none():
    if native.core.cuda.version() != "no":
        pytest.skip("this build has CUDA")
    assert native.core.build_info()["cuda"] == "no"
    binary = Path(inspect.getfile(native.core)).read_bytes()
    for word in (b"libcudart", b"libcuda.so", b"cudaLaunchKernel", b"cudaGetDeviceCount"):
        assert word not in binary


def test_spills_are_read_from_a_build_log():
    clean = """
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
    spilled = clean + clean.replace("good", "bad_").replace("0 bytes spill st", "16 bytes spill st")
    assert check_spills.spills(clean) == (1, [])
    count, complaints = check_spills.spills(spilled)
    assert count == 2 and len(complaints) == 1
    assert complaints[0].startswith("_Z4bad_v for sm_90a") and "16 of spill stores" in complaints[0]
    for stack, wrong in ((16, 0), (24, 1)):
        framed = clean.replace("0 bytes stack frame", f"{stack} bytes stack frame")
        assert len(check_spills.spills(framed)[1]) == wrong


@pytest.mark.parametrize(("log", "code"), [("", 1), ("0 bytes stack frame", 1)])
def test_a_log_without_kernels_is_no_proof(tmp_path, log, code):
    path = tmp_path / "build.log"
    path.write_text(log, encoding="utf-8")
    assert check_spills.main(str(path)) == code
