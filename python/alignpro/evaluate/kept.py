"""The arms of a measurement, each kept as it is finished: what was stopped goes on with them.

A file of JSON lines. The first says what all of them were made from; an arm that also depends on
something of its own is taken where that is the same, and made anew where it is not.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignpro.config import StageConfig, to_mapping
from alignpro.files import append_line, read_kept
from alignpro.fingerprints import (
    Fingerprints,
    as_fingerprints,
    differences,
    of_adapter,
    of_rows,
    other_settings,
    to_plain,
)
from alignpro.models.adapter import AdapterWeights
from alignpro.models.mixture import Mixture
from alignpro.run_directory import add_note
from alignpro.types import Prompt, Rewrite, Rollout

# What every response of every arm depends on, beside fingerprints.
_FIELDS = (
    *("prompter", "target", "reward", "seed", "rewrite", "response", "prompting", "date"),
    *("num_rewrites", "num_responses"),
)
_log = logging.getLogger(__name__)


def arms_path(output: Path | None) -> Path | None:
    """Where the arms of a report are kept: beside it."""
    return None if output is None else output.with_name(output.name + ".arms.jsonl")


def calls_path(output: Path | None) -> Path | None:
    """Where the calls to a target behind an endpoint are kept: beside what they were made for."""
    return None if output is None else output.with_name(output.name + ".calls.jsonl")


def kept_date(path: Path | None) -> str | None:
    """The date that kept arms were told, for the others to be told the same."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
        if path is not None:
            with path.open(encoding="utf-8") as file:
                return str(json.loads(next(file))["config"]["date"])
    return None


class KeptArms:
    """Arms by name. Made as it is, it holds none and keeps none; see `at`. As a context manager it
    is the measurement: an error that ends the block is told what is kept."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._head: str | None = None  # the first line, while no arm is there
        self._known: dict[str, dict[str, Any]] = {}
        self._done: list[str] = []

    def __enter__(self) -> KeptArms:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._done:
            add_note(error, f"{', '.join(self._done)}: kept; the same command goes on")

    @classmethod
    def at(cls, path: Path | None, config: StageConfig, made_from: Fingerprints) -> KeptArms:
        """Those of a file, which the first arm makes where it is not there; of None, none.

        Raises:
            ValueError: a file of something else, or of a measurement with other inputs: it names
                them.
        """
        kept = cls()
        if path is None:
            return kept
        kept._path = path
        mapping = to_mapping(config)
        head = {name: mapping[name] for name in _FIELDS}
        if not (path.exists() and kept._read(path, head, made_from)):
            kept._head = json.dumps({"config": head, "fingerprints": to_plain(made_from)})
        return kept

    def get(self, name: str, of: Any) -> dict[str, Any] | None:
        """What was kept under the name, if it was made from the same."""
        row = self._known.get(name)
        if row is None:
            return None
        if row["of"] != json.loads(json.dumps(of)):
            _log.warning("%s: %s is made anew: it was another one", self._path, name)
            return None
        self._done.append(name)
        value: dict[str, Any] = row["value"]
        return value

    def put(self, name: str, of: Any, value: Mapping[str, Any]) -> None:
        if self._path is not None:
            if self._head is not None:
                self._path.unlink(missing_ok=True)
                append_line(self._path, self._head)
                self._head = None
            append_line(self._path, json.dumps({"arm": name, "of": of, "value": value}))
            self._done.append(name)

    def hash_of(self, adapter: AdapterWeights | Mixture | None) -> str | None:
        """What an arm depends on that has an adapter of its own."""
        return None if adapter is None or self._path is None else of_adapter(adapter).hash

    def of_prompts(self, of: Any, prompts: Sequence[Prompt]) -> Any:
        """What an arm depends on beside what all do, and the prompts that were short enough."""
        return None if self._path is None else [of, of_rows("", prompts).hash]

    def rollout(
        self, name: str, of: Any, prompts: Sequence[Prompt], sample: Callable[[], Rollout]
    ) -> Rollout:
        """The rollout under the name, sampled where it is not there."""
        of = self.of_prompts(of, prompts)
        kept = self.get(name, of)
        if kept is not None:
            return read_rollout(kept, prompts)
        rollout = sample()
        self.put(name, of, plain_rollout(rollout))
        return rollout

    def _read(self, path: Path, head: Mapping[str, Any], made_from: Fingerprints) -> bool:
        """Whether there is an arm."""
        first: list[Any] = []

        def take(number: int, row: Any) -> None:
            if number == 1:
                first.extend((row["config"], as_fingerprints(row["fingerprints"])))
            else:
                self._known[row["arm"]] = {"of": row["of"], "value": row["value"]}

        read_kept(path, take, "an arm that was kept")
        if not self._known:
            return False
        drawn, before = first
        settings = other_settings(drawn, json.loads(json.dumps(head)), before, made_from)
        other = [
            f"{key} was {was!r}, is {value!r}"
            for key, (was, value) in settings.items()
            if not key.endswith(".adapter")  # goes by what is in it
        ]
        other += differences(before, made_from, "its arms were made from")
        if other:
            raise ValueError(
                f"{path}: of another measurement ({'; '.join(other)}); move it away, or --output "
                "names another file"
            )
        return True


def plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """As JSON can hold it, but for the prompts, which are at hand."""
    return {
        "rewrites": [[w.to_plain() for w in group] for group in rollout.rewrites],
        "seconds": rollout.seconds,
        "generated_tokens": rollout.generated_tokens,
        "common_draws": rollout.common_draws,
        "failed": rollout.failed,
        "unscored": rollout.unscored,
    }


def read_rollout(plain: Mapping[str, Any], prompts: Sequence[Prompt]) -> Rollout:
    """What `plain_rollout` made of it."""
    rewrites = [[Rewrite.of_plain(w) for w in group] for group in plain["rewrites"]]
    more = ("seconds", "generated_tokens", "common_draws", "failed", "unscored")
    return Rollout(list(prompts), rewrites, **{name: plain[name] for name in more})
