"""From a line of a config file to a reward: "vader+0.5*topic", "2*mine:score", "learned:FOLDER"."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from alignpro import rewards
from alignpro.rewards.check import shorten
from alignpro.rewards.combine import WeightedSum
from alignpro.rewards.function import from_callable
from alignpro.types import Reward

# Terms are joined by "+", but for the one of an exponent as in 1e+2.
_PLUS = re.compile(r"(?<!\d[eE])\+")
_WEIGHTED = re.compile(r"\s*([^*]*?)\s*\*\s*(.*?)\s*")


# In alignpro.rewards.
_NAMED = {
    "vader": "VaderReward",
    "topic": "TopicReward",
    "house_rules": "HouseRulesReward",
    "forbidden": "ForbiddenReward",
    "confidence": "ConfidenceReward",
    "grounding": "GroundingReward",
    "chair": "ChairReward",
}
_OPTION = {"confidence": "per", "grounding": "method"}  # that is named behind "#"
_KNOWN = (
    f"known: {', '.join(_NAMED)}, 'module:function', 'learned:FOLDER', 'schema:FILE', 'hf:NAME' or "
    "'hf:NAME#label'"
)


def build_reward(spec: str | Mapping[str, Any]) -> Reward:
    """Builds a reward from a line, or from a mapping of names to weights or options.

    A line is a sum of terms ``[weight*]name``. A name is one of "vader", "topic", "house_rules",
    "forbidden", "confidence", "grounding" and "chair"; "module:function" for your own (installed or
    in the current folder; signatures as in ``from_callable``; a class is called with the options to
    make the reward); "grounding#words" and "confidence#response" for their other ways;
    "learned:FOLDER" for what `alignpro reward fit` wrote; "schema:FILE" for records by a schema (as
    JSON, or "schema:FILE#lines"); or "hf:NAME[#label]" for a Hugging Face sequence classifier. A
    mapping says the same with room for options: ``{"vader": 1.0,
    "hf:NAME#label": {"weight": 0.5, "pair": False}}``.

    Raises ValueError with one line on what was expected; ImportError where a package is missing.
    """
    terms = _parse(spec)
    if len(terms) == 1:
        (name, (weight, options)) = next(iter(terms.items()))
        if weight == 1:
            return _build_one(name, options)
    return WeightedSum(
        {n: (weight, _build_one(n, options)) for n, (weight, options) in terms.items()}
    )


def check_reward(spec: str | Mapping[str, Any]) -> None:
    """Refuse what is surely none, without building or importing anything. Raises ValueError."""
    for name in _parse(spec):
        _check_name(name)


def _check_name(name: str) -> None:
    named, _, option = name.partition("#")
    known = named in (_OPTION if option else _NAMED)
    if not known and ":" not in name:
        raise ValueError(f"unknown reward {shorten(name)}; {_KNOWN}")


def _parse(spec: str | Mapping[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    return _parse_line(spec) if isinstance(spec, str) else _parse_mapping(spec)


def _parse_line(line: str) -> dict[str, tuple[float, dict[str, Any]]]:
    terms: dict[str, tuple[float, dict[str, Any]]] = {}
    for term in _PLUS.split(line):
        match = _WEIGHTED.fullmatch(term)
        weight = _as_weight(match[1], line) if match else 1.0
        name = match[2] if match else term.strip()
        if not name:
            raise ValueError(f"reward {shorten(line)}: expected a name in every term; {_KNOWN}")
        if name in terms:
            raise ValueError(f"reward {shorten(line)}: {name!r} appears twice; add up its weights")
        terms[name] = (weight, {})
    return terms


def _parse_mapping(spec: Mapping[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    if not isinstance(spec, Mapping):
        raise ValueError(f"reward: expected text or a mapping, got {type(spec).__name__}; {_KNOWN}")
    if not spec:
        raise ValueError(f"reward: expected at least one name, got an empty mapping; {_KNOWN}")
    terms: dict[str, tuple[float, dict[str, Any]]] = {}
    for name, value in spec.items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = _as_weight(options.pop("weight", 1.0), name)
        terms[str(name)] = (weight, options)
    return terms


def _as_weight(value: object, where: str) -> float:
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"reward {shorten(where)}: expected a number as weight, got {value!r}")


def _build_one(name: str, options: dict[str, Any]) -> Reward:
    _check_name(name)
    given: dict[str, Any]
    if name.startswith("hf:"):
        build = _classifier_builder(name)
    elif name.startswith("learned:"):
        build = functools.partial(rewards.LearnedReward, name.removeprefix("learned:"))
    elif name.startswith("schema:"):
        path, _, form = name.removeprefix("schema:").partition("#")
        given = {"format": form} if form else {}
        build = functools.partial(rewards.SchemaReward, path, **given)
    elif (named := name.partition("#"))[0] in _NAMED:
        given = {_OPTION[named[0]]: named[2]} if named[2] else {}
        build = functools.partial(getattr(rewards, _NAMED[named[0]]), **given)
    else:
        found = _load_object(name, options)
        try:
            return from_callable(found, name)
        except TypeError as error:  # a signature that no reward has
            raise ValueError(str(error)) from None
    try:
        return build(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot take {sorted(options)}: {error}") from error


def _classifier_builder(name: str) -> Callable[..., Reward]:
    path, _, label = name.removeprefix("hf:").partition("#")
    if not path:
        raise ValueError(f"reward {name!r}: expected a model's name or path after 'hf:'")

    def build(**options: Any) -> Reward:
        from alignpro.rewards.classifier import ClassifierReward

        if label:
            if "label" in options:
                raise ValueError(f"reward {name!r}: the label is given twice")
            options["label"] = label
        return ClassifierReward(path, **options)

    return build


def _raised(error: Exception) -> str:
    """What a module of the user's raised, and at which of its lines, as one line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    what = " ".join(str(error).split())
    if isinstance(error, SyntaxError):  # says where it is itself
        return f"{type(error).__name__}: {what}"
    return f"{type(error).__name__}: {what} ({os.path.basename(last.filename)}, line {last.lineno})"


def _load_object(name: str, options: dict[str, Any]) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise ValueError(f"reward {shorten(name)}: expected 'module:function'")
    folder, file = os.path.split(module_name)
    if folder or file.endswith(".py"):
        raise ValueError(
            f"reward {name!r}: expected the module's name, '{file.removesuffix('.py')}:{attribute}'"
            ", and not its file; it is looked for in the current folder and where PYTHONPATH says"
        )
    # A console script does not look in the current folder, where a user's own module usually is.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name + ".").startswith(missing + "."):  # not what it imports itself
            raise ValueError(
                f"reward {name!r}: no module {missing!r} is installed or in {here!r}; {_KNOWN}"
            ) from error
        raise ValueError(f"reward {name!r}: {_raised(error)}") from error
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if found is None:
        there = [k for k, v in vars(module).items() if inspect.isfunction(v) and k[0] != "_"]
        near = difflib.get_close_matches(attribute, there, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}{hint}")
    if isinstance(found, type):
        try:
            inspect.signature(found).bind(**options)
        except TypeError as error:
            given = sorted(options) or "no options"
            raise ValueError(f"reward {name!r} cannot be made with {given}: {error}") from None
        found = found(**options)
    elif options:
        raise ValueError(f"reward {name!r}: a function takes no options, got {sorted(options)}")
    if not callable(found):
        raise ValueError(f"reward {name!r}: expected a callable, got {type(found).__name__}")
    return found
