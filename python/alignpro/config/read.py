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
        return from_mapping(cls, apply_overrides(mapping, overrides), base=base)
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
