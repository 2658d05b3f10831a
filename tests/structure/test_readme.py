"""The README's commands are the ones that CI runs, and the layers of docs/layers.md the tree's."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "pip install -c constraints.txt '.[train]' && alignpro quickstart"
TEST = (
    "pip install -c constraints.txt --config-settings=cmake.define.ALIGNPRO_TESTING=ON '.[test]' "
    "&& pytest"
)


def fenced(text: str, language: str) -> list[str]:
    """The bodies of the fenced blocks of one language."""
    return [b.strip() for b in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def layer_complaints(readme: str, package: Path, source: Path) -> list[str]:
    """Folders and modules of the tree that the list of layers leaves out."""
    names = [p.name + "/" for p in source.iterdir() if p.is_dir()]
    for path in package.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            names.append(path.name + "/")
        elif path.suffix == ".py" and path.stem != "__init__":
            names.append(path.name)
    blocks = "\n".join(fenced(readme, "text"))
    return [f"{name}: not in the list of layers" for name in sorted(names) if name not in blocks]


def test_fenced_reads_bodies_by_language():
    text = "a\n```bash\none && two\n```\n```python\nx\n```\n```bash\nthree\n```\n"
    assert fenced(text, "bash") == ["one && two", "three"]


def test_readme_has_the_two_commands_each_in_a_block_of_its_own():
    blocks = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "bash")
    assert blocks[:2] == [QUICKSTART, TEST]


def test_ci_names_and_checks_the_same_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f'QUICKSTART_COMMAND="{QUICKSTART}"' in script
    assert f'TEST_COMMAND="{TEST}"' in script
    # It runs the variable that it compared with the README, not a copy.
    assert len(re.findall(r'bash -c "\$TEST_COMMAND"', script)) == 1


def test_the_page_of_layers_lists_every_layer():
    readme = (ROOT / "docs/layers.md").read_text(encoding="utf-8")
    assert layer_complaints(readme, ROOT / "python/alignpro", ROOT / "src/alignpro") == []


def test_a_layer_left_out_is_seen(tmp_path):
    (tmp_path / "p" / "extra").mkdir(parents=True)
    (tmp_path / "p" / "one.py").touch()
    (tmp_path / "s" / "core").mkdir(parents=True)
    complaints = layer_complaints("```text\none.py\ncore/\n```\n", tmp_path / "p", tmp_path / "s")
    assert complaints == ["extra/: not in the list of layers"]


def test_readme_is_one_screen_and_sends_to_pages_that_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 100
    for page in re.findall(r"`docs/([\w./-]+\.\w+)`", readme):
        assert (ROOT / "docs" / page).is_file(), page
    for name in ("tutorial", "concepts", "configuration", "troubleshooting"):
        assert f"docs/{name}.md" in readme


def test_python_blocks_are_valid_and_use_the_public_names():
    blocks = fenced((ROOT / "docs/engine.md").read_text(encoding="utf-8"), "python")
    for block in blocks:
        compile(block, "engine.md", "exec")
    for name in ("load_model", "generate", "score", "Pipeline", "rollout"):
        assert name in blocks[0]
    assert "linear_logprob" in blocks[1]
