"""YAML and key=value overrides to checked dataclasses, and dataclasses to plain values."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignpro.config.fields import TEXT, Kinds, accepted, from_mapping
from alignpro.config.keys import current_key, current_keys

T = TypeVar("T")


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_mapping` (and JSON, and YAML) read back."""
    mapping: dict[str, Any] = _plain(dataclasses.asdict(config))
    return mapping


def check_config(config: Any, cls: type) -> None:
    """Refuse what is no ``cls``, with what would make one of it."""
    if isinstance(config, cls):
        return
    name, hint = cls.__name__, ""
    if isinstance(config, Mapping):
        hint = f"; alignpro.config.from_mapping(alignpro.{name}, mapping) makes one"
    elif isinstance(config, (str, Path)):
        hint = f"; alignpro.load_yaml(alignpro.{name}, file) reads one"
    raise ValueError(f"config: expected {name}, got {type(config).__name__}{hint}")


def load_yaml(
    cls: type[T],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    base: T | None = None,
) -> T:
    """Read a YAML file (None: all defaults), then apply overrides of the form ``a.b=value``.

    base: what is taken for the fields that are left out, instead of the defaults.
    """
    import yaml

    mapping: Any = {}
    if path is not None:
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "no such file"
            if (Path(path) / "config.json").is_file():
                found += f"; that of a run is {Path(path) / 'config.json'}"
            raise FileNotFoundError(f"{path}: expected a YAML file of settings, found {found}")
        try:
            loader = _loader()(Path(path).read_text(encoding="utf-8"))
            root = loader.get_single_node()
            repeated = _repeated_key(root)
            mapping = None if root is None else loader.construct_document(root)
        except RecursionError:
            raise ValueError(f"{path}: not YAML: nested too deeply") from None
        except yaml.YAMLError as error:
            said, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
            at = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
            said = " ".join(str(said or error).split())
            raise ValueError(f"{path}: not YAML: {said}{at}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
        except ValueError as error:  # an integer of thousands of digits
            raise ValueError(f"{path}: {error}") from None
        if repeated is not None:
            raise ValueError(f"{path}: {repeated}")
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, dict):
            raise ValueError(
                f"{path}: expected a YAML file of settings, such as `alignpro init` writes, got a "
                f"{type(mapping).__name__}"
            )

    def read(settings: Sequence[str]) -> T:
        return from_mapping(cls, apply_overrides(cls, mapping, settings), base=base)

    try:
        return read(overrides)
    except RecursionError:  # an alias within what it names
        raise ValueError(f"{path}: expected settings, got a list or mapping in itself") from None
    except ValueError as error:
        said, of_file = str(error), ""
        try:
            read(())
        except ValueError as alone:
            of_file = str(alone)
        is_its = path is not None and said == of_file  # else of what was typed
        raise ValueError(f"{path}: {said}" if is_its else said) from None


@functools.cache
def _loader() -> Any:
    """YAML's safe loader, for which 010 is ten, and 1:30 no number (YAML 1.1: 8, and 90). A date is
    text, as JSON has it."""
    import yaml

    integer, number = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
    ours = (integer, number, "tag:yaml.org,2002:timestamp")

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own table, without its numbers
            first: [(tag, pattern) for tag, pattern in known if tag not in ours]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    def whole(loader: Any, node: Any) -> int:
        return int(node.value, 16 if "x" in node.value else 10)

    digits, exponent = r"[0-9]+(?:_[0-9]+)*", r"(?:[eE][-+]?[0-9]+)?"
    decimal = rf"[-+]?(?:{digits}\.[0-9]*|\.[0-9]+){exponent}"
    Loader.add_implicit_resolver(
        integer, re.compile(rf"(?:[-+]?{digits}|0x[0-9a-fA-F]+)$"), list("-+0123456789")
    )
    Loader.add_implicit_resolver(
        number,
        re.compile(rf"(?:{decimal}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
        list("-+.0123456789"),
    )
    Loader.add_constructor(integer, whole)
    return Loader


def _repeated_key(root: Any) -> str | None:
    """Which key of a mapping there is twice: YAML takes the last one without a word."""
    waiting, known = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in known or not isinstance(getattr(node, "value", None), list):
            continue
        known.add(id(node))  # an alias may stand within what it names
        lines: dict[str, int] = {}
        for part in node.value:
            key, value = part if isinstance(part, tuple) else (None, part)
            waiting.append(value)
            if key is None or not isinstance(key.value, str):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                return f"key {key.value!r} appears twice (lines {lines[key.value]} and {line})"
            lines[key.value] = line
    return None


def apply_overrides(
    cls: type[Any], mapping: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """A copy of ``mapping``, the fields of ``cls``, with every ``a.b=value`` set.

    A text is taken as it was typed, its line breaks, "#" and outer spaces with it, unless YAML's
    quotes stand around all of it; null is none. Values of other fields are read as YAML.
    """
    result: dict[str, Any] = current_keys(cls, _plain(mapping))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f'override "{override}": expected key=value')
        first, *inner = key.strip().split(".")
        *parents, last = [*current_key(cls, first).split("."), *inner]
        value = _typed(text, accepted(cls, [*parents, last]))
        group = result
        for parent in parents:
            if group.get(parent) is None:  # a null may become a group
                group[parent] = {}
            elif isinstance(group[parent], str):  # so may text: prompter=smollm2 prompter.adapter=a
                group[parent] = {TEXT: group[parent]}
            group = group[parent]
            if not isinstance(group, dict):
                raise ValueError(f'override "{override}": "{parent}" is a value, not a group')
        group[last] = value
    return result


def _typed(text: str, kinds: Kinds) -> Any:
    """What was typed, for a field of such kinds."""
    import yaml

    if not text:
        return ""
    try:
        node = yaml.compose(text, Loader=_loader())
        value = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError):  # ValueError: an integer of thousands of digits
        return text  # a plain string such as "hf:owner/name: x" need not be YAML
    quoted = (
        isinstance(node, yaml.ScalarNode)
        and node.style in ("'", '"')
        and node.end_mark.index == len(text.rstrip())
    )
    none = value is None and bool(text.strip())
    group = kinds.group and isinstance(value, (dict, list)) and text.lstrip()[0] in "{["
    return text if kinds.text and not (quoted or none or group) else value


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, after) of the values in which nested mappings differ, by path: "prompter.model"."""
    one, other = _flat(before), _flat(after)
    paths = sorted({*one, *other})
    return {p: (one.get(p), other.get(p)) for p in paths if one.get(p) != other.get(p)}


def _flat(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        group = isinstance(value, Mapping)
        flat |= _flat(value, f"{path}{key}.") if group else {path + key: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
