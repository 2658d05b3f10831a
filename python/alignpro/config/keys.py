"""What the keys of a configuration are called: now, before, and elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
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
    "adv_estimator": "algorithm",
    "advantage_estimator": "algorithm",
    "base_model": "prompter.model",
    "batch_size": "prompts_per_step",
    "beta": "kl_coef",
    "clip_ratio": "ppo.clip_range",
    "cliprange": "ppo.clip_range",
    "column": "data.prompt",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "default_local_dir": "run_dir",
    "eps_clip": "ppo.clip_range",
    "epsilon": "ppo.clip_range",
    "eval_steps": "heldout.every",
    "file": "data.path",
    "generate_max_len": "response.max_new_tokens",
    "gradient_accumulation_steps": "micro_batch_size",
    "init_kl_coef": "kl_coef",
    "input_key": "data.prompt",
    "instruction_column": "data.instruction",
    "kl": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "loss_type": "algorithm",
    "lr": "learning_rate",
    "max_completion_length": "response.max_new_tokens",
    "max_epochs": "steps",
    "max_length": "response.max_new_tokens",
    "max_prompt_length": "on_too_long",
    "max_response_length": "response.max_new_tokens",
    "max_steps": "steps",
    "model_name_or_path": "prompter.model",
    "model_path": "prompter.model",
    "n_samples_per_prompt": "num_rewrites",
    "num_epochs": "steps",
    "num_generations": "num_rewrites",
    "num_train_epochs": "steps",
    "output": "run_dir",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "prompts_per_step",
    "pretrain": "prompter.model",
    "prompt_column": "data.prompt",
    "prompt_data": "data.path",
    "prompt_key": "data.prompt",
    "prompt_max_len": "on_too_long",
    "report_to": "track",
    "reward_funcs": "reward",
    "reward_function": "reward",
    "reward_model": "reward",
    "rollout_batch_size": "prompts_per_step",
    "rollout_n": "num_rewrites",
    "save_freq": "checkpoint_every",
    "save_path": "run_dir",
    "save_steps": "checkpoint_every",
    "test_freq": "heldout.every",
    "total_epochs": "steps",
    "train_batch_size": "prompts_per_step",
    "train_file": "data.path",
    "train_files": "data.path",
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


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a line that refuses ``given``: the closest that is known, or nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _is_now(key: str, name: str, now: str) -> str:
    return f"{name}: is now {name.removesuffix(key)}{now}"


def unknown_key(cls: type[Any], key: str, name: str, value: Any = None) -> str:
    """The line that refuses a key which ``cls`` does not have, with the one that may be meant.
    name: the key's path. value: what it was given; of a mapping, its one key is what is meant."""
    fields = [field.name for field in dataclasses.fields(cls)]
    now = _now(cls, _REPLACED, key)
    if now is not None:
        return _is_now(key, name, now)
    group, dot, rest = key.partition(".")
    if dot and group in fields:
        unknown = f'unknown configuration key "{name}"'
        return f"{unknown}; in a file its groups are nested, {group}: {{{rest}: ...}}"
    prefix = name.removesuffix(key)
    while isinstance(value, Mapping) and len(value) == 1:  # verl's actor.optim.lr
        ((key, value),) = value.items()
        name += f".{key}"
    meant = " or ".join(
        f'"{path}"' for path in _meant(cls, fields, str(key).lower().replace("-", "_"), prefix)
    )
    return f'unknown configuration key "{name}"; ' + (
        f"did you mean {meant}?" if meant else f"known: {', '.join(fields)}"
    )


def _meant(cls: type[Any], fields: list[str], key: str, prefix: str) -> list[str]:
    """The paths of the keys that may be meant. prefix: of ``cls`` in the configuration, with a dot
    behind it."""
    inside = [
        (group, field.name)
        for group in fields
        for hint in alternatives(type_hints(cls)[group])
        if dataclasses.is_dataclass(hint)
        for field in dataclasses.fields(hint)
    ]

    def in_groups(wanted: str) -> list[str]:
        paths = [f"{prefix}{group}.{field}" for group, field in inside if field == wanted]
        return list(dict.fromkeys(paths))

    if key in fields:  # but for its case, or where it was looked for
        return [prefix + key]
    of = prefix.removesuffix(".").rpartition(".")[2]
    elsewhere = _ELSEWHERE.get(f"{of}_{key}") or _ELSEWHERE.get(key, "")
    top, dot, field = elsewhere.partition(".")
    if ((top, field) in inside) if dot else top in fields:
        return [prefix + elsewhere]
    if field in fields:  # data.column
        return [prefix + field]
    deeper = [field for _, field in inside]
    if key in deeper:
        return in_groups(key)
    for group, _ in inside:  # lora_rank, of lora.rank
        own = [field for of, field in inside if of == group]
        rest = key.removeprefix(f"{group}_")
        if rest != key and (close := difflib.get_close_matches(rest, own, n=1, cutoff=0.7)):
            return [f"{prefix}{group}.{close[0]}"]
    if close := difflib.get_close_matches(key, fields, n=1, cutoff=0.7):
        return [prefix + close[0]]
    if close := difflib.get_close_matches(key, deeper, n=1, cutoff=0.8):
        return in_groups(close[0])
    return []
