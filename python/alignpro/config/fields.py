"""How the fields of every dataclass here are checked: in one place, where an instance is made.

`checked` reads each field by its annotation before the class's own ``__post_init__`` looks at it,
so that Python, YAML and key=value overrides are refused in the same words.

pydantic was weighed and left out. It has no word for what these messages say (the closest known
key, the path with its group, bytes with a unit, text where a group may stand) nor for a group that
keeps the defaults of the class around it, so about as many lines of ours would translate its errors
as read the values here; and it takes 0.25 s to import, where all of `config` takes 0.1 s.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from alignpro.config.keys import (
    alternatives,
    current_keys,
    did_you_mean,
    type_hints,
    unknown_key,
)

T = TypeVar("T")


class Range(NamedTuple):
    """What a number may be. Stands in an annotation: ``rank: Annotated[int, at_least(1)]``."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float) -> Range:
    return Range(lambda v: bool(v >= least), f"at least {least}")


def above(limit: float) -> Range:
    return Range(lambda v: bool(v > limit), f"above {limit}")


# Read from text with a unit as well: "1.5GB", "800MiB".
Bytes = Annotated[int, "bytes", at_least(1)]
Seed = Annotated[int, Range(lambda v: 0 <= v < 2**64, "between 0 and 2**64 - 1")]
Threads = Annotated[int, at_least(1)] | None  # None: the container's CPU quota


def _is_iso_date(value: str) -> bool:
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


# A path, or a name that may stand for one: "~" is the home directory, as in a shell.
Place = Annotated[str, "place"]
# A reward, as `alignpro.build_reward` reads it.
RewardName = Annotated[str, "reward"]

# What a chat template that asks for the date is told, by every model of a run. None: today's, which
# the run then records; to evaluate a run: the one that it recorded.
Date = Annotated[str, Range(_is_iso_date, 'a date such as "2026-11-28"')] | None

# The key of a group that was given as text before some of its fields were: see `apply_overrides`.
TEXT = ""

# Choices that are gone: (field, value) to what does it.
_INSTEAD = {
    ("algorithm", "grpo"): "its advantage in the clipped loss is ppo with normalize_advantage true",
    ("track", "tensorboard"): "TensorBoard is written wherever it is installed",
}


def checked(cls: type[T]) -> type[T]:
    """Check the fields of every instance by their annotations. Stands below ``@dataclass``.

    Raises (when an instance is made):
        ValueError: a value of the wrong type, or none of a Literal's; one line naming the field.
    """
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        hints = type_hints(type(self))
        for f in dataclasses.fields(self):
            value = read_value(getattr(self, f.name), hints[f.name], f.name, default_of(f))
            object.__setattr__(self, f.name, value)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


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
    if TEXT in mapping and (text_field := getattr(cls, "text_field", "")):
        mapping = {text_field: mapping[TEXT], **{k: v for k, v in mapping.items() if k != TEXT}}
    mapping = current_keys(cls, mapping, path)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ValueError(unknown_key(cls, str(key), name, value))
        # A group that names some of its fields keeps this class's defaults for the others, which
        # need not be those of the group's own class.
        default = default_of(fields[key]) if base is None else getattr(base, key)
        values[key] = read_value(value, type_hints(cls)[key], name, default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{path}.{error}" if path else str(error)) from None


def unchecked(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance that nobody looked at yet: a ``base`` for `from_mapping`, which checks the whole
    when all is in place. What ``values`` lacks is the class's default."""
    made = object.__new__(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = values[f.name] if f.name in values else default_of(f)
        object.__setattr__(made, f.name, value)
    return made


def read_value(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    """``value`` as the annotated type, or a ValueError naming the field.

    default: where ``hint`` is a dataclass, what a mapping of some of its fields starts from. A
        dataclass with a ``text_field`` may be given as text, which is then that field.
    """
    if hint is Any:
        return _read_json(value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(value, arguments, name, default)
    if origin is Annotated:
        return _read_annotated(value, arguments, name)
    if origin is Literal:
        return _read_choice(value, arguments, name)
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{name}: expected a list such as [...], got {value!r}")
        return tuple(read_value(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    if _is_dict(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a mapping, got {value!r}")
        kind_of_key, kind_of_item = arguments
        return {
            read_value(k, kind_of_key, f"{name}: key"): read_value(v, kind_of_item, f"{name}.{k}")
            for k, v in value.items()
        }
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _read_group(value, hint, name, default)
    return _read_plain(value, hint, name)


def _read_json(value: Any, name: str) -> Any:
    """What goes to an endpoint or a template, and to config.json."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{name}: expected what JSON has, got {value!r}") from None
    return value


def _read_annotated(value: Any, arguments: tuple[Any, ...], name: str) -> Any:
    kind, *notes = arguments
    read = _read_bytes(value, name) if "bytes" in notes else read_value(value, kind, name)
    if "place" in notes:
        require(name, read, read != "", "a path or a name")
        read = os.path.expanduser(str(read))
    for note in notes:
        if isinstance(note, Range):
            require(name, read, note.holds(read), note.words)
    return read


def _read_choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    if value in choices:
        return value
    instead = _INSTEAD.get((name.rpartition(".")[2].partition("[")[0], str(value)))
    advice = f"; {instead}" if instead else did_you_mean(str(value), map(str, choices))
    listed = ", ".join(map(repr, choices))
    raise ValueError(f"{name}: expected one of {listed}, got {value!r}{advice}")


def _read_group(value: Any, cls: type[Any], name: str, default: Any) -> Any:
    if isinstance(value, cls):
        return value
    text_field = getattr(cls, "text_field", None)
    if text_field is not None and isinstance(value, (str, os.PathLike)):
        value = {text_field: value}
    elif text_field is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected text or a mapping of fields, got {value!r}")
    base = default if isinstance(default, cls) else None
    return from_mapping(cls, value, path=name, base=base)


def _read_plain(value: Any, kind: Any, name: str) -> Any:
    """A number, text or a truth value, as what readers of YAML and numpy make of it."""
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # numpy's integers are integers
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and isinstance(value, datetime.date):
        return value.isoformat()  # other readers of YAML take 2026-11-28 for one
    if kind is not int and isinstance(value, kind):
        return value
    words = {int: "an integer", str: "text", bool: "true or false", float: "a number"}
    raise ValueError(f"{name}: expected {words.get(kind, kind)}, got {value!r}")


def _is_dict(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


class Kinds(NamedTuple):
    """What a field may be given as, beside numbers and choices."""

    text: bool
    group: bool  # a mapping or a list


def accepted(cls: type[Any], keys: Sequence[str]) -> Kinds:
    """What the field of ``cls`` that nested ``keys`` lead to takes; nothing where there is none."""
    hints: list[Any] = [cls]
    for key in keys:
        found = []
        for hint in hints:
            if dataclasses.is_dataclass(hint):
                found.append(type_hints(hint).get(key))
            elif _is_dict(hint):
                found.append(typing.get_args(hint)[1])
        hints = [one for hint in found for one in alternatives(hint)]
    groups = [h for h in hints if dataclasses.is_dataclass(h) or _is_dict(h)]
    lists = [h for h in hints if typing.get_origin(h) is tuple]
    short = any(getattr(group, "text_field", None) for group in groups)
    return Kinds(text=short or str in hints, group=bool(groups or lists))


def _read_bytes(value: Any, name: str) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?))?B", text)
    if match is None:
        raise ValueError(f'{name}: expected bytes, or text as "800MiB" or "1.5GB", got {value!r}')
    number, prefix, binary = match.groups()
    factor = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return int(float(number) * factor)


def _read_union(value: Any, arguments: tuple[Any, ...], name: str, default: Any) -> Any:
    if value is None and type(None) in arguments:
        return None
    if isinstance(value, Mapping):  # meant as the group: its own message is the one that helps
        groups = (a for a in arguments if dataclasses.is_dataclass(a) or _is_dict(a))
        arguments = tuple(groups) or arguments
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):  # as the list
        lists = (a for a in arguments if typing.get_origin(a) is tuple)
        arguments = tuple(lists) or arguments
    if len(arguments) == 1:
        return read_value(value, arguments[0], name, default)
    errors: list[str] = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return read_value(value, argument, name, default)
        except ValueError as error:
            errors.append(str(error))
    alternatives = " or ".join(
        dict.fromkeys(e.removeprefix(f"{name}: expected ").split(", got ")[0] for e in errors)
    )
    nothing = " or null" if type(None) in arguments else ""
    raise ValueError(f"{name}: expected {alternatives}{nothing}, got {value!r}")


def is_noted(hint: Any, note: str) -> bool:
    """Whether a field's annotation has a note, such as that of `RewardName`."""
    if typing.get_origin(hint) is Annotated:
        return note in typing.get_args(hint)[1:]
    return any(is_noted(argument, note) for argument in typing.get_args(hint))


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """A ValueError that names the field, unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def only_default(config: Any, name: str, where: str, path: str = "") -> None:
    """Refuse an option that would do nothing."""
    value = getattr(config, name)
    default = default_of(type(config).__dataclass_fields__[name])
    require(path + name, value, value == default, f"its default {default!r} (it goes {where})")


def count_of(group: Any, there: int, source: str | None, path: str = "") -> int:
    """How many of the rows that are there a group's ``num_prompts`` takes; its default, which
    nobody asked for, takes what there is. path: of the group, for messages.

    Raises ValueError for fewer rows than were asked for, or fewer than 2.
    """
    asked = group.num_prompts
    if asked == default_of(type(group).__dataclass_fields__["num_prompts"]) or asked is None:
        asked = min(there, asked or there)
    wanted = max(2, asked)
    if wanted > there:
        rows = f"{source} has {there} rows"
        raise ValueError(f"{path}num_prompts: {rows}, {wanted} asked for")
    return int(wanted)


def default_of(f: dataclasses.Field[Any]) -> object:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default
