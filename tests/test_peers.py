"""The peers of the benchmarks, as far as they can be tried where none is installed."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from alignpro.bench.work import ROLLOUT, WORK, random_prompts

BENCH = Path(__file__).parent / "bench"
SCRIPTS = sorted((BENCH / "peers").glob("run_*.py"))
OPTIONS = argparse.Namespace(benchmark="decode", repeats=2, peers=None, model=Path("x.gguf"))

sys.path.insert(0, str(BENCH / "peers"))
environments, harness, registry = map(
    importlib.import_module, ("environments", "harness", "registry")
)


def module(name: str) -> ModuleType:
    """A script of tests/bench, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


peers = module("peers")


def our_report(seconds: list[float]) -> dict:
    return {
        "benchmark": "decode",
        "machine": {"threads": 2, "versions": {"alignpro": "1"}},
        "compute": "float32",
        "vocab_size": 111,
        "repeats": len(seconds),
        "prompt_tokens": 3,
        "new_tokens": 5,
        "load_seconds": 0.5,
        "peak_rss_bytes": 1000,
        "results": [{"batch": batch, "all_seconds": seconds} for batch in (1, 2)],
    }


def request() -> dict:
    return peers.request_of(our_report([1.0]), 2)


def run_harness(monkeypatch, tmp_path: Path, load) -> dict:
    file = tmp_path / "report.json"
    asked = {**request(), "model": "x.gguf", "variant": ""}
    monkeypatch.setattr(sys, "argv", ["script", json.dumps(asked), str(file)])
    harness.generation("numpy", load)
    return json.loads(file.read_text("utf-8"))


def test_a_peer_is_given_the_work_of_ours(monkeypatch, tmp_path: Path):
    calls = []

    def generate(prompts, new_tokens, seed):
        calls.append((prompts, new_tokens, seed))
        tokens = [[index] * new_tokens for index in range(len(prompts))]
        return harness.Written(tokens, [[-1.5] * new_tokens] * len(prompts))

    report = run_harness(monkeypatch, tmp_path, lambda request: generate)
    assert calls == [
        (random_prompts(111, batch, 3), 5, seed) for batch in (1, 2) for seed in range(3)
    ]
    assert [len(row["all_seconds"]) for row in report["results"]] == [2, 2]  # one to warm up
    assert report["peak_rss_bytes"] > 0 and report["load_seconds"] > 0 and report["version"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_has_no_sizes_of_its_own(script: Path):
    text = script.read_text("utf-8")
    assert "harness.generation(" in text or "harness.start(" in text
    numbers = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
    sizes = {1, 16, 64, 37, 512, 128, *vars(WORK).values(), *vars(ROLLOUT).values()}
    own = {n for n in numbers & sizes if type(n) in (int, float) and n not in (1, 4, 16)}
    assert not own - {WORK.learning_rate}, own
    shared = ("rewrites", "rewrite_tokens", "response_tokens", "lora_rank", "kl_coef")
    if script.stem == "run_trl":
        assert all(hasattr(WORK, size) and f"WORK.{size}" in text for size in shared)
    if script.stem == "run_transformers":
        assert all(hasattr(ROLLOUT, size) and f"ROLLOUT.{size}" in text for size in shared[:3])


def test_every_peer_has_its_script_and_its_versions():
    assert {peer.script for peer in registry.PEERS} == {script.name for script in SCRIPTS}
    assert {peer.environment for peer in registry.PEERS} == set(environments.NAMES)
    for name in environments.NAMES:
        lines = (environments.REQUIREMENTS / f"{name}.txt").read_text("utf-8").splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#")), name


def with_peers(monkeypatch, tmp_path: Path, chosen: list) -> dict:
    """A comparison in which ours takes 1 s and then 3 s, on the Python of the tests."""
    runs = iter([our_report([1.0]), our_report([1.0]), our_report([3.0]), our_report([3.0])])
    monkeypatch.setattr(peers, "run_ours", lambda *a: next(runs))
    monkeypatch.setattr(peers, "PEERS", chosen)
    return peers.compare(OPTIONS, tmp_path)


def script(tmp_path: Path, name: str, body: str):
    file = tmp_path / f"{name}.py"
    file.write_text(
        f"import json, sys\nsys.path.insert(0, {str(BENCH / 'peers')!r})\nimport harness\n{body}\n"
    )
    return registry.Peer(name, name, str(file), "any")


def test_a_peer_that_cannot_run_is_a_row_with_its_reason(monkeypatch, tmp_path: Path, capsys):
    """No environment, a script that dies, one that loses a case; the one after them is measured."""

    def python_of(name, folder):
        if name == "absent":
            raise environments.Unavailable("absent: pip: no such version")
        return Path(sys.executable)

    monkeypatch.setattr(registry, "python_of", python_of)
    written = "harness.Written([[i] * n for i in range(len(p))], None)"
    loses = f"def g(p, n, s):\n  if len(p) == 1: raise MemoryError('too few')\n  return {written}\n"
    report = with_peers(
        monkeypatch,
        tmp_path,
        [
            script(tmp_path, "absent", ""),
            script(tmp_path, "dies", "raise ImportError('no module named dies')"),
            script(tmp_path, "loses", loses + "harness.generation('numpy', lambda r: g)"),
            script(
                tmp_path,
                "works",
                f"harness.generation('numpy', lambda r: lambda p, n, s: {written})",
            ),
        ],
    )
    rows = {(row["name"], row["batch"]): row for row in report["results"]}
    for batch in (1, 2):
        assert rows["absent", batch]["skipped"] == "absent: pip: no such version"
        assert rows["dies", batch]["skipped"] == "ImportError: no module named dies"
        assert rows["works", batch]["skipped"] is None and rows["works", batch]["seconds"] > 0
    assert rows["loses", 1]["skipped"] == "MemoryError: too few"
    assert rows["loses", 1]["tokens_per_second"] is None
    assert rows["loses", 2]["skipped"] is None and rows["loses", 2]["logprobs"] is False
    shown = peers.table(report)
    assert shown.row_count == len(report["results"]) == 2 * (2 + 4)


def test_ours_is_the_median_of_both_runs_and_ratios_are_against_it(monkeypatch, tmp_path: Path):
    peer = registry.Peer("peer", "peer", "none", "any")
    theirs = {"benchmark": "decode", "load_seconds": 1.0, "peak_rss_bytes": 7, "version": "2"}
    cases = [{**case, "all_seconds": [8.0, 8.0]} for case in request()["cases"]]
    cases = [{**case, "logprobs": True} for case in cases]
    monkeypatch.setattr(peers, "run_peer", lambda *a: {**theirs, "results": cases})
    report = with_peers(monkeypatch, tmp_path, [peer])
    ours, row = report["results"][0], report["results"][-1]
    assert (ours["seconds"], ours["runs_seconds"]) == (2.0, [1.0, 3.0])
    # 5 tokens in 1 s and in 3 s: the median of the rates; 10 tokens in 8 s for two sequences.
    assert ours["tokens_per_second"] == pytest.approx((5 + 5 / 3) / 2)
    assert row["tokens_per_second"] == 10 / 8
    assert row["ratios"]["alignpro float32"] == pytest.approx((10 + 10 / 3) / 2 / (10 / 8))


def test_prefill_counts_the_prompt_and_rollout_what_was_written():
    prefill = {**our_report([2.0]), "benchmark": "prefill", "new_tokens": 1}
    assert peers.our_rows(prefill, prefill)[1]["tokens_per_second"] == 2 * 3 / 2.0
    rollout = {
        **our_report([2.0]),
        "benchmark": "rollout",
        "prompts": 2,
        "rewrites": 4,
        "all_seconds": [2.0, 4.0],
        "generated_tokens": [100, 120],
    }
    (row,) = peers.our_rows(rollout, rollout)
    assert (row["batch"], row["tokens_per_second"]) == (8, (50 + 30) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--model", "/no/such.gguf"], "--model: no such file"),
        (["decode", "--model", __file__, "--json", __file__], "--json: .* is there already"),
        (["decode", "--model", __file__, "--json", "/no/such/x.json"], "--json: no such folder"),
        (["decode", "--model", __file__, "--repeats", "0"], "--repeats: expected 1 or more"),
        (["rollout", "--model", __file__, "--peers", "vllm"], "expected some of transformers; got"),
        (["environments", "--peers", "nobody"], "--peers: expected some of trl, transformers"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(peers, "run_ours", lambda *a: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match=message):
        peers.main(arguments)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "message"),
    [
        ([[1, 2], [3]], None, "expected 2 x 2 tokens"),
        ([[1, 2], [3, 9]], None, "outside the vocabulary"),
        ([[1, 2], [3, 4]], [[-1.0, -1.0]], "log-probabilities of 2"),
        ([[1, 2], [3, 4]], [[-1.0, math.nan], [-1.0, -1.0]], "that is none"),
        ([[1, 2], [3, 4]], [[0.0, 0.0], [0.0, 0.0]], "not computed"),
    ],
)
def test_other_work_than_was_asked_for_is_refused(tokens, logprobs, message):
    case = harness.Case(batch=2, prompt_tokens=3, new_tokens=2)
    with pytest.raises(ValueError, match=message):
        harness.check(harness.Written(tokens, logprobs), case, vocab_size=9)


def test_sequences_that_are_all_the_same_are_refused():
    case = harness.Case(batch=2, prompt_tokens=3, new_tokens=5)
    with pytest.raises(ValueError, match="nothing was drawn"):
        harness.check(harness.Written([[1] * 5] * 2, None), case, vocab_size=9)


def test_a_failed_install_is_one_line_and_is_tried_again(monkeypatch, tmp_path: Path):
    failed = SimpleNamespace(returncode=1, stderr="a\nERROR: no matching distribution\n\nnotice")
    monkeypatch.setattr(environments.subprocess, "run", lambda *a, **k: failed)
    for _ in range(2):
        with pytest.raises(environments.Unavailable, match=r"^vllm: venv: ERROR: no matching"):
            environments.python_of("vllm", tmp_path)


def test_a_folder_is_not_given_to_what_reads_gguf(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(registry, "python_of", lambda *a: Path(sys.executable))
    peer = next(peer for peer in registry.PEERS if peer.reads == "gguf")
    with pytest.raises(environments.Unavailable, match="reads GGUF files"):
        registry.run_peer(peer, request(), tmp_path, tmp_path)


# Log-probabilities spread by 1.3; Q4_1 moves them by 0.06, Q8_0 by 0.002.
@pytest.mark.parametrize(("quantization", "tolerance"), [("q4_1", 0.1), ("q8_0", 0.008)])
def test_a_random_model_loads_from_both_forms(quantization: str, tolerance: float, tmp_path: Path):
    from gguf import GGUFReader

    from alignpro.models.native_model import load_model

    random_model = module("random_model")
    shape = replace(random_model.SHAPES["tiny"], kv_heads=1)
    file = tmp_path / "model.gguf"
    random_model.write_folder(shape, tmp_path / "hf", "float32", seed=3)
    random_model.write_gguf(shape, file, quantization, "tiny", seed=3)
    folder, quantised = load_model(tmp_path / "hf"), load_model(file)
    assert quantised.config["streamed_bytes"] < folder.config["streamed_bytes"] / 2
    assert quantised.config["vocab_size"] == folder.config["vocab_size"] == shape.vocab
    theta = GGUFReader(file).fields["qwen2.rope.freq_base"].contents()
    assert theta == json.loads((tmp_path / "hf" / "config.json").read_text())["rope_theta"]
    chat = [{"role": "user", "content": "the tin on"}]
    tokens = quantised.tokenizer.encode_chat(chat)
    assert tokens == folder.tokenizer.encode_chat(chat)
    ends = [random_model.vocabulary(shape.vocab).index(text) for text in random_model.SPECIAL]
    assert ends[2] in tokens and quantised.tokenizer.eos_ids == (ends[2], ends[0])
    expected, found = (model.score([tokens])[0] for model in (folder, quantised))
    assert all(math.isfinite(value) and value < 0 for value in found)
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < tolerance
    assert max(expected) - min(expected) > 1  # flat ones would agree whatever the weights


def test_chats_are_padded_on_the_left():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "answer": 3}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %} answer{% endif %}"
    )
    inputs = harness.chat_inputs(tokenizer, ["a b a", "a"])
    assert inputs["input_ids"].tolist() == [[1, 2, 1, 3], [0, 0, 1, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
