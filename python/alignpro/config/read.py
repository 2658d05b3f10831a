"""Mappings, YAML and overrides to checked dataclasses, and back."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from alignpro.config.fields import Bytes, default_of

T = TypeVar("T")


def from_mapping(
    cls: type[T], mapping: Mapping[str, Any], *, path: str = "", base: T | None = None
) -> T:
    """Build the dataclass ``cls`` from nested mappings, checking names, types and ranges.

    Args:
        path: the name of ``mapping`` in its parent, for messages.
        base: what the fields that are left out are taken from; None: the class's defaults.

    Raises:
        ValueError: an unknown key (with the closest known one), a value of the wrong type or out of
            range; one line that starts with the field's path.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path or cls.__name__}: expected a mapping of fields, got {mapping!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(fields)}"
            raise ValueError(f'unknown configuration key "{name}"{hint}')
        # A group that names some of its fields keeps this class's defaults for the others, which
        # need not be those of the group's own class.
        default = default_of(fields[key]) if base is None else getattr(base, key)
        values[key] = _coerce(value, hints[key], name, default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{path}.{error}" if path else str(error)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_mapping` (and JSON, and YAML) read back."""
    mapping: dict[str, Any] = _plain(dataclasses.asdict(config))
    return mapping


def load_yaml(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (None: all defaults), then apply overrides of the form ``a.b=value``."""
    import yaml

    mapping: Any = {}
    if path is not None:
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
        room = result
        for parent in parents:
            room = room.setdefault(parent, {})
            if not isinstance(room, dict):
                raise ValueError(f'override "{override}": "{parent}" is a value, not a group')
        room[last] = value
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _coerce(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    """``value`` as the annotated type, or a ValueError naming the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if hint == Bytes:
        return _coerce_bytes(value, name)
    if origin is Literal:
        if value in arguments:
            return value
        choices = ", ".join(repr(a) for a in arguments)
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint_text = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}{hint_text}")
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return tuple(_coerce(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        base = default if isinstance(default, hint) else None  # type: ignore[arg-type]
        return from_mapping(hint, value, path=name, base=base)  # type: ignore[arg-type]
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {int: "an integer", str: "text", bool: "true or false", float: "a number"}
    raise ValueError(f"{name}: expected {kind.get(hint, hint)}, got {value!r}")


def _coerce_bytes(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?))?B", text)
    if match is None:
        raise ValueError(f'{name}: expected bytes, or text as "800MiB" or "1.5GB", got {value!r}')
    number, prefix, binary = match.groups()
    factor = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return int(float(number) * factor)


def _coerce_union(value: Any, arguments: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    if isinstance(value, Mapping):  # meant as the group: its own message is the one that helps
        arguments = tuple(a for a in arguments if dataclasses.is_dataclass(a)) or arguments
    if len(arguments) == 1:
        return _coerce(value, arguments[0], name)
    errors: list[str] = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _coerce(value, argument, name)
        except ValueError as error:
            errors.append(str(error))
    alternatives = " or ".join(
        dict.fromkeys(e.removeprefix(f"{name}: expected ").split(", got ")[0] for e in errors)
    )
    nothing = " or null" if type(None) in arguments else ""
    raise ValueError(f"{name}: expected {alternatives}{nothing}, got {value!r}")
