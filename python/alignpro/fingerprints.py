"""What a run was made from, as hashes: models, adapters, data, reward and chat templates.

They lie in fingerprints.json of the run, so that a resume, a replay or an evaluation with anything
else is refused or said, by name. What a configuration says is compared as it is; here is what its
names stood for at the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignpro.config import HOW_IT_RUNS, differing
from alignpro.files import write_json
from alignpro.models.adapter import AdapterWeights, LoraWeights
from alignpro.models.adapter_files import adapter_folder, is_mixture
from alignpro.models.fingerprint import fingerprint
from alignpro.models.mixture import BASE, Mixture, read_mixture
from alignpro.models.tokenizer import Tokenizer
from alignpro.rewards.check import reward_name, shorten
from alignpro.run_directory import FINGERPRINTS, read_record
from alignpro.types import Conversation, Prompt

_log = logging.getLogger(__name__)
_PROMPT, _ROW = 12, 20  # hexadecimal digits of a row's prompt, and of all its columns


@dataclass(frozen=True)
class Fingerprint:
    """``name`` is what it was called; ``hash`` is what it was."""

    name: str
    hash: str


Fingerprints = dict[str, Fingerprint]  # by what it is: "data", "weights of the prompter", ...


def of_models(prompter: Any, target: Any) -> Fingerprints:
    """Weights and templates of models in this process; of an endpoint nothing is known."""
    found: Fingerprints = {}
    for role, model in {"prompter": prompter, "target": target}.items():
        if getattr(model, "fingerprint", None) is None:
            continue
        found[f"weights of the {role}"] = Fingerprint(model.name, model.fingerprint)
        settings = getattr(model.tokenizer, "template_settings", None)
        if settings is not None:
            found[f"chat template of the {role}"] = of_template(model.tokenizer)
    return found


def of_template(tokenizer: Tokenizer) -> Fingerprint:
    """The text and its variables; the date has a field of its own."""
    text, variables, _ = tokenizer.template_settings
    return Fingerprint("", _hash(text, dict(variables)))


def of_adapter(weights: AdapterWeights | Mixture) -> Fingerprint:
    if isinstance(weights, Mixture):
        return Fingerprint("", _of_mixture(weights))
    if not isinstance(weights, LoraWeights):
        digest = hashlib.sha256(str(weights.placed).encode())
        digest.update(weights.rows.tobytes())
        return Fingerprint("", digest.hexdigest())
    digest = hashlib.sha256(f"{weights.rank} {weights.scale}".encode())
    for module, pair in weights.matrices.items():
        digest.update(module.encode())
        for matrix in pair:
            digest.update(matrix.tobytes())
    return Fingerprint("", digest.hexdigest())


def of_adapter_folder(folder: str | Path) -> Fingerprint:
    """Of an adapter that the engine reads by itself, or a mixture of them."""
    if is_mixture(folder):
        return Fingerprint(str(folder), _of_mixture(read_mixture(folder)))
    return Fingerprint(str(folder), fingerprint(adapter_folder(folder)))


def _of_mixture(mixture: Mixture) -> str:
    """By what its members hold, wherever they lie."""
    members = []
    for member, weight in mixture.members:
        if isinstance(member, AdapterWeights):
            hashed = of_adapter(member).hash
        else:
            hashed = BASE if member == BASE else of_adapter_folder(member).hash
        members.append([hashed, weight])
    return _hash(members, mixture.sampling, mixture.tries)


def of_rows(
    name: str, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]] | None = None
) -> Fingerprint:
    """Row by row, so that what differs can be named."""
    rows = []
    for index, prompt in enumerate(prompts):
        row = {key: values[index] for key, values in (columns or {}).items()}
        whole = _hash(Conversation.of(prompt).plain)[:_PROMPT] + _hash(row)
        rows.append(whole[:_ROW])
    return Fingerprint(name, "".join(rows))


def of_reward(reward: Any) -> Fingerprints:
    """The files of a reward's own functions and classes, of a local classifier, and of a learned
    reward, which names its model. What such a
    file imports is not followed; alignpro's own rewards go by its version."""
    found: Fingerprints = {}
    for name, part in _parts(reward):
        value = _of_source(part)
        if value is not None:
            found[f"reward {name}"] = value
    return found


def _parts(reward: Any) -> Iterator[tuple[str, Any]]:
    terms = getattr(reward, "terms", None)
    if isinstance(terms, Mapping):
        for _, part in terms.values():
            yield from _parts(part)
    else:
        yield reward_name(reward), reward


def _of_source(part: Any) -> Fingerprint | None:
    kind, _, named = reward_name(part).partition(":")
    if kind in ("hf", "learned"):
        folder = named.partition("#")[0]
        return Fingerprint(folder, fingerprint(Path(folder))) if Path(folder).is_dir() else None
    function = getattr(part, "function", part)
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    source = function if inspect.isroutine(function) else type(function)
    if str(getattr(source, "__module__", "")).split(".")[0] == "alignpro":
        return None
    try:
        file = Path(inspect.getsourcefile(source) or "")
        text = file.read_bytes() if file.is_file() else inspect.getsource(source).encode()
    except (OSError, TypeError):  # made up in an interpreter: there is no text of it
        return None
    return Fingerprint(file.name, hashlib.sha256(text).hexdigest())


def differences(then: Fingerprints, now: Fingerprints, doing: str) -> list[str]:
    """What is another one than it was, a phrase each. What only one of them knows is passed over.

    doing: what was made then: "the run began with".
    """
    found = []
    for what, mine in now.items():
        theirs = then.get(what)
        if theirs is None or theirs.hash == mine.hash:
            continue
        named = f"{what} {mine.name}".strip()
        if _is_data(what):
            found.append(f"{named}: {_other_rows(theirs.hash, mine.hash)}")
        else:
            before = f" ({theirs.name})" if theirs.name not in ("", mine.name) else ""
            found.append(f"{named}: not what {doing}{before}")
    return found


# Keys of a configuration that say where something lies, and what it is.
_PLACES = (
    ("prompter.model", "weights of the prompter"),
    ("target.model", "weights of the target"),
    ("prompter.chat_template", "chat template of the prompter"),
    ("target.chat_template", "chat template of the target"),
    ("prompter.adapter", "adapter that training began with"),
    ("prompter.adapter", "adapter of the prompter"),
    ("target.adapter", "adapter of the target"),
    ("data.path", "data"),
    ("heldout.data.path", "held-out data"),
)


def same_elsewhere(then: Fingerprints, now: Fingerprints) -> dict[str, str]:
    """What is known to be the same as it was, by the key that says where it lies: another place is
    no other run."""
    return {
        key: what
        for key, what in _PLACES
        if what in then and what in now and then[what].hash == now[what].hash
    }


def other_settings(
    before: Mapping[str, Any], after: Mapping[str, Any], then: Fingerprints, now: Fingerprints
) -> dict[str, tuple[Any, Any]]:
    """(before, after) by path of what configurations differ in and models answer by: not how they
    run, nor where that lies which is the same."""
    elsewhere = same_elsewhere(then, now)
    return {
        path: values
        for path, values in differing(before, after).items()
        if path.partition(".")[2] not in HOW_IT_RUNS and path not in elsewhere
    }


def _other_rows(then: str, now: str) -> str:
    before, after = _rows(then), _rows(now)
    if len(before) != len(after):
        more = f"{len(before):,} rows then, {len(after):,} now"
        common = min(len(before), len(after))
        return more + "; those that were there are the same" * (before[:common] == after[:common])
    if sorted(before) == sorted(after):
        return f"the same {len(after):,} rows in another order"
    other = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    shown = ", ".join(map(str, other[:5])) + ", ..." * (len(other) > 5)
    prompts = [i for i in other if before[i][:_PROMPT] != after[i][:_PROMPT]]
    where = "" if prompts else " in other columns than the prompt"
    return f"{len(other):,} of {len(after):,} rows differ{where} (row {shown}, counted from 0)"


def shared_prompts(data: Fingerprint, prompts: Sequence[Prompt]) -> list[str]:
    """Those of ``prompts`` that are among the rows of ``data``, for a line of text each."""
    known = {row[:_PROMPT] for row in _rows(data.hash)}
    return [
        shorten(Conversation.of(prompt).last_turn)
        for prompt in prompts
        if _hash(Conversation.of(prompt).plain)[:_PROMPT] in known
    ]


def _rows(value: str) -> list[str]:
    return [value[i : i + _ROW] for i in range(0, len(value), _ROW)]


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# --- in a run ---


def check_same_inputs(
    run_dir: Path, now: Fingerprints, *, allow_changes: bool = False
) -> tuple[list[str], dict[str, str]]:
    """What differs from what the run was made from, and `same_elsewhere`. Data may grow and be
    corrected as a run goes on; other models, another adapter, template or reward make another run
    of it, and are refused unless ``allow_changes``.

    Raises:
        ValueError: names what differs.
    """
    then = read_fingerprints(run_dir)
    data = {what: one for what, one in now.items() if _is_data(what)}
    rest = {what: one for what, one in now.items() if not _is_data(what)}
    found = differences(then, rest, "the run began with")
    if found and not allow_changes:
        raise ValueError(
            f"cannot resume: {'; '.join(found)}. --allow-changes goes on all the same, "
            "run_dir=... starts another run"
        )
    return found + differences(then, data, ""), same_elsewhere(then, now)


def _is_data(what: str) -> bool:
    return what.endswith("data")


def read_fingerprints(run_dir: Path) -> Fingerprints:
    """Of a run; none where it has none, or a damaged file of them, which a warning names."""
    try:
        record = read_record(run_dir / FINGERPRINTS)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _log.warning("%s; what the run was made from is not compared", error)
        return {}
    return as_fingerprints(record.get("fingerprints"))


def as_fingerprints(value: Any) -> Fingerprints:
    """Of JSON; what is none of them is left out."""
    items = value.items() if isinstance(value, dict) else ()
    return {
        what: Fingerprint(str(one["name"]), str(one["hash"]))
        for what, one in items
        if isinstance(one, dict) and {"name", "hash"} <= one.keys()
    }


def write_fingerprints(
    run_dir: Path, now: Fingerprints, *, changed: Sequence[str] = (), step: int = 0
) -> None:
    """changed: what is another one from ``step`` on, which is said, too."""
    path = run_dir / FINGERPRINTS
    changes: list[Any] = []
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged one is begun anew
        changes = list(read_record(path).get("changes", []))
    for what in changed:
        _log.warning("from step %d on: %s", step, what)
    if changed:
        changes.append({"step": step, "what": list(changed)})
    write_json(path, {"fingerprints": to_plain(now), "changes": changes})


def to_plain(fingerprints: Fingerprints) -> dict[str, Any]:
    return {what: asdict(one) for what, one in fingerprints.items()}
