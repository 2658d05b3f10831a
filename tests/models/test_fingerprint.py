"""Hashes of model files: of what is in them, wherever they lie, and read once."""

from __future__ import annotations

import os

import pytest

from alignpro.models import fingerprint as module
from alignpro.models.fingerprint import fingerprint
from alignpro.models.resolve import plain_name


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_model_is_known_by_what_is_in_its_files(tmp_path, kind):
    place = tmp_path / "model"
    if kind == "folder":
        place.mkdir()
        (place / "config.json").write_text("{}")
    weights = place / "model.safetensors" if kind == "folder" else place
    weights.write_bytes(b"a" * 5000)
    first = fingerprint(place)
    assert fingerprint(place) == first
    weights.write_bytes(b"a" * 2500 + b"b" + b"a" * 2499)  # as long
    assert fingerprint(place) != first
    weights.write_bytes(b"a" * 5000)
    assert fingerprint(place) == first
    moved = tmp_path / "moved"
    place.rename(moved)
    assert fingerprint(moved) == first


def test_a_large_model_is_read_in_blocks_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr("alignpro.models.fingerprint._BLOCK", 10)
    monkeypatch.setattr("alignpro.models.fingerprint._HASHED_WHOLE", 100)
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(250)) * 4)
    seen = {fingerprint(path)}
    for changed in (0, 105, 500, 905):
        content = bytearray(bytes(range(250)) * 4)
        content[changed] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint(path))
    assert len(seen) == 5


def test_a_large_model_is_read_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_REMEMBERED", 1000)
    reads = []
    plain = module._hash
    monkeypatch.setattr(module, "_hash", lambda *a, **k: (reads.append(1), plain(*a, **k))[1])
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(b"a" * 1000)
    other.write_bytes(b"b" * 1000)
    first = fingerprint(path)
    assert fingerprint(other) != first
    assert fingerprint(path) == first and len(reads) == 2
    before = path.stat()
    path.write_bytes(b"c" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as old as it was
    assert fingerprint(path) not in (first, fingerprint(other)) and len(reads) == 3
    (tmp_path / "cache" / "fingerprints.json").write_text("torn{")
    path.write_bytes(b"a" * 1000)
    assert fingerprint(path) == first


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "/m/qwen2.5-0.5b-instruct-q4_k_m.gguf", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "models--Qwen--Qwen2.5-0.5B-Instruct", True),
        ("bartowski/Phi-3.5-mini-instruct-GGUF", "Phi-3.5-mini-instruct-IQ4_XS.gguf", True),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "Llama-3.2-1B-Instruct-BF16.gguf", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-1.5b-instruct-q4_k_m.gguf", False),
    ],
)
def test_names_of_one_model(one, other, same):
    assert (plain_name(one) == plain_name(other)) == same
