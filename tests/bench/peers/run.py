"""`alignpro bench step` beside TRL's GRPOTrainer on the same work, in one run.

    python tests/bench/peers/run.py --model MODEL.gguf --json FILE

Makes the peer's virtual environment under --environment unless one is there (torch first, as the
CPU build of the pinned version where the package index has it; then requirements.txt), runs ours,
the peer, and ours again, one after the other, and prints the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


def environment(folder: Path) -> Path:
    """The Python of the peer's environment, made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", TORCH], check=True)
        requirements = ["-r", str(HERE / "requirements.txt"), TORCH]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def measured(command: list[str], file: Path) -> dict:
    subprocess.run([*command, "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=5, help="of each, after one to warm up")
    parser.add_argument("--environment", type=Path, default=Path("build/peers-trl"))
    options = parser.parse_args()
    model = str(options.model.resolve())
    peer_python = environment(options.environment.resolve())
    ours = [sys.executable, "-c", "from alignpro.cli import main; main()", "bench", "step"]
    ours += ["--model", model, "--steps", str(options.steps)]
    peer = [str(peer_python), str(HERE / "trl_step.py"), "--model", model]
    peer += ["--steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as folder:
        first = measured(ours, Path(folder) / "ours.json")
        theirs = measured(peer, Path(folder) / "trl.json")
        second = measured(ours, Path(folder) / "ours-again.json")
    seconds = statistics.median(first["all_seconds"] + second["all_seconds"])
    memory = max(first["peak_rss_bytes"], second["peak_rss_bytes"])
    result = {
        "alignpro": {
            "seconds_per_step": seconds,
            "peak_rss_bytes": memory,
            "runs": [first, second],
        },
        "trl": theirs,
        "ratio": theirs["seconds_per_step"] / seconds,
    }
    print(f"alignpro {seconds:7.2f} s a step, {memory / 1e9:.2f} GB peak")
    print(f"TRL      {theirs['seconds_per_step']:7.2f} s, {theirs['peak_rss_bytes'] / 1e9:.2f} GB")
    print(f"ratio    {result['ratio']:7.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
