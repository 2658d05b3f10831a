"""What the keys of a configuration are called: now, before, and elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

_log = logging.getLogger(__name__)

# What keys were called before there was one group for a model, and one word for a thing: read as
# what they are now, with a warning.
_RENAMED = {
    "model": "prompter.model",
    "adapter": "prompter.adapter",
    "untuned": "prompter.adapter",
    "prompter_device": "prompter.device",
    "prompter_compute": "prompter.compute",
    "target_device": "target.device",
    "target_compute": "target.compute",
    "zero_signal": "zero_advantage_group",
    "split": "data.split",
}
# Keys that are gone, to what says it now.
_REPLACED = {
    "prompter_mode": "prompter.deterministic (true for strict, false for fast)",
    "target_mode": "target.deterministic (true for strict, false for fast)",
}
# What other trainers call a key of ours, for the line that refuses it.
_ELSEWHERE = {
    "base_model": "prompter.model",
    "beta": "kl_coef",
    "column": "data.prompt",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "init_kl_coef": "kl_coef",
    "instruction_column": "data.instruction",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "lr": "learning_rate",
    "max_completion_length": "response.max_new_tokens",
    "max_steps": "steps",
    "model_name_or_path": "prompter.model",
    "num_generations": "num_rewrites",
    "num_train_epochs": "steps",
    "output": "run_dir",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "prompts_per_step",
    "prompt_column": "data.prompt",
    "reward_funcs": "reward",
    "train_batch_size": "prompts_per_step",
}


type_hints: Callable[[Any], dict[str, Any]] = functools.cache(
    functools.partial(typing.get_type_hints, include_extras=True)
)


def alternatives(hint: Any) -> list[Any]:
    """The types that a hint allows, without their notes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [one for argument in arguments for one in alternatives(argument)]
    if origin is Annotated:
        return [] if "bytes" in arguments else alternatives(arguments[0])
    return [hint]


class ReadsOldKeys(type):
    """The metaclass of the configurations that had the old keys. Their constructors read them, as
    `from_mapping` does, and refuse an unknown key in the same words (a TypeError)."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        kwargs = current_keys(cls, kwargs)
        for key in kwargs:
            if key not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise TypeError(unknown_key(cls, key, key))
        return super().__call__(*args, **kwargs)


def current_key(cls: type[Any], key: str, name: str = "") -> str:
    """What ``key`` of ``cls`` is called now, "group.field" for that of a group; warns of an old
    name. name: the key's path, for that line."""
    now = _now(cls, _RENAMED, key)
    if now is None or key in cls.__dataclass_fields__:
        return key
    _log.warning("%s", _is_now(key, name or key, now))
    return now


def current_keys(cls: type[Any], mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``mapping``, the fields of ``cls``, with old names of keys replaced.

    Raises ValueError where the new one is given as well.
    """
    current = dict(mapping)
    for key in mapping:
        name = f"{path}.{key}" if path else str(key)
        now = current_key(cls, key, name)
        if now == key:
            continue
        value = current.pop(key)
        group, _, inside = now.partition(".")
        beside = current.get(group)
        if inside:
            if isinstance(beside, (str, os.PathLike)):
                hints = alternatives(type_hints(cls)[group])
                beside = {next(h.text_field for h in hints if hasattr(h, "text_field")): beside}
            is_free = beside is None or (isinstance(beside, Mapping) and inside not in beside)
            value = {**(beside or {}), inside: value} if is_free else value
        else:
            is_free = group not in current
        if not is_free:
            raise ValueError(f"{_is_now(key, name, now)}, which is given as well")
        current[group] = value
    return current


def _now(cls: type[Any], names: Mapping[str, str], key: str) -> str | None:
    """What stands for an old key of the class."""
    now = names.get(key) if isinstance(cls, ReadsOldKeys) else None
    return now if now and now.partition(".")[0] in cls.__dataclass_fields__ else None


def _is_now(key: str, name: str, now: str) -> str:
    return f"{name}: is now {name.removesuffix(key)}{now}"


def unknown_key(cls: type[Any], key: str, name: str) -> str:
    """The line that refuses a key which ``cls`` does not have, with the one that may be meant.
    name: the key's path."""
    fields = cls.__dataclass_fields__
    now = _now(cls, _REPLACED, key)
    if now is not None:
        return _is_now(key, name, now)
    unknown = f'unknown configuration key "{name}"'
    group, dot, rest = key.partition(".")
    if dot and group in fields:
        return f"{unknown}; in a file its groups are nested, {group}: {{{rest}: ...}}"
    inside = [
        (group, field)
        for group in fields
        for hint in alternatives(type_hints(cls)[group])
        if dataclasses.is_dataclass(hint)
        for field in type_hints(hint)
    ]

    def in_groups(wanted: str) -> str:
        prefix = name.removesuffix(key)
        paths = [f"{prefix}{group}.{field}" for group, field in inside if field == wanted]
        return f"{unknown}; did you mean {' or '.join(dict.fromkeys(paths))}?"

    elsewhere = _ELSEWHERE.get(key, "")
    top, dot, field = elsewhere.partition(".")
    if ((top, field) in inside) if dot else top in fields:
        return f"{unknown}; did you mean {name.removesuffix(key)}{elsewhere}?"
    deeper = [field for _, field in inside]
    if key in deeper:
        return in_groups(key)
    for group, _ in inside:  # lora_rank, of lora.rank
        own = [field for of, field in inside if of == group]
        rest = key.removeprefix(f"{group}_")
        if rest != key and (close := difflib.get_close_matches(rest, own, n=1, cutoff=0.7)):
            return f"{unknown}; did you mean {name.removesuffix(key)}{group}.{close[0]}?"
    if close := difflib.get_close_matches(key, fields, n=1, cutoff=0.7):
        return f'{unknown}; did you mean "{close[0]}"?'
    if close := difflib.get_close_matches(key, deeper, n=1, cutoff=0.8):
        return in_groups(close[0])
    return f"{unknown}; known: {', '.join(fields)}"
