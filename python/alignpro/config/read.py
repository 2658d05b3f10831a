"""YAML and key=value overrides to checked dataclasses, and dataclasses to plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignpro.config.fields import TEXT, from_mapping

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


def load_yaml(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (None: all defaults), then apply overrides of the form ``a.b=value``."""
    import yaml

    mapping: Any = {}
    if path is not None:
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: expected a YAML file of settings, found {found}")
        try:
            mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, dict):
            raise ValueError(
                f"{path}: expected a mapping of fields, got a {type(mapping).__name__}"
            )
    try:
        return from_mapping(cls, apply_overrides(mapping, overrides))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path is not None else str(error)) from None


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``mapping`` with every ``a.b=value`` set; values are read as YAML."""
    import yaml

    result: dict[str, Any] = _plain(mapping)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f'override "{override}": expected key=value')
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            value = text  # a plain string such as "hf:owner/name: x" need not be YAML
        *parents, last = key.strip().split(".")
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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
