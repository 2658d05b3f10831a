"""What every key of a configuration is for: from the docstrings of its fields, their one owner.

A field's docstring stands below it. Its first paragraph is one sentence, which `commented_yaml`
shows; the pages show the rest as well.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from alignpro.config.fields import Range, default_of
from alignpro.config.keys import did_you_mean, type_hints

_WIDTH = 96


class Key(NamedTuple):
    """One key of a configuration. ``text``: a sentence, and perhaps more paragraphs."""

    path: str
    text: str
    values: str  # what it may be: "at least 1", "rloo, reinforce, ppo or closed_form"; or ""
    default: Any
    group: type | None  # of the keys inside it

    @property
    def sentence(self) -> str:
        return self.text.split("\n\n")[0]

    @property
    def inside(self) -> Any:
        """The group's defaults, where they are not its class's own."""
        return self.default if self.group and isinstance(self.default, self.group) else None


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """{field: docstring} of a dataclass and the classes it is derived from, white space joined."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(node.target, ast.Name) and isinstance(after.value, ast.Constant)
                paragraphs = str(after.value.value).split("\n\n")
                docs[node.target.id] = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    return docs


def describe(cls: type, path: str = "", base: Any = None) -> Iterator[Key]:
    """Every key of a configuration in the order of its fields, those inside a group after it.

    base: an instance whose values are the defaults; None: those of ``cls``.
    """
    for one in _own_keys(cls, path, base):
        yield one
        if one.group is not None:
            yield from describe(one.group, f"{one.path}.", one.inside)


def _own_keys(cls: type, path: str, base: Any) -> Iterator[Key]:
    docs, hints = field_docs(cls), type_hints(cls)
    for f in dataclasses.fields(cls):
        default = default_of(f) if base is None else getattr(base, f.name)
        hint = hints[f.name]
        yield Key(path + f.name, docs.get(f.name, ""), allowed(hint), default, group_of(hint))


def group_of(hint: Any) -> type | None:
    """The dataclass that a field holds, or may hold."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    inside = (group_of(a) for a in typing.get_args(hint)) if union else ()
    return next((group for group in inside if group is not None), None)


def allowed(hint: Any) -> str:
    """What a value of the annotated type may be, where there is something to say."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [note.words for note in arguments[1:] if isinstance(note, Range)]
        return " and ".join(ranges)
    if origin is Literal:
        return " or ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, dict.fromkeys(allowed(a) for a in arguments)))
    if origin is tuple:
        words = allowed(arguments[0])
        return f"each {words}" if words else ""
    return ""


def commented_yaml(
    cls: type,
    *,
    values: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
    key: str | None = None,
) -> str:
    """A configuration as YAML, with every key's sentence above it; `load_yaml` reads it back.

    Args:
        values: {path: value} of the keys that are not at their default.
        only: the paths to write, whose groups come with them; None: all. A group that is null by
            default is written as null, its keys as comments behind it.
        key: one key alone, with the whole of its text.

    Raises:
        ValueError: a key that the configuration does not have.
    """
    wanted = None
    if key is not None:
        wanted = _with_groups([key]) | {k for k in _known(cls, key) if k.startswith(f"{key}.")}
    elif only is not None:
        wanted = _with_groups(only)
    lines: list[str] = []
    shown: dict[type, str] = {}  # where the keys of a class stand already

    def write(keys: Iterable[Key], dead: bool) -> None:
        """dead: inside a group that is null, where every key is a comment."""
        for one in keys:
            if wanted is not None and one.path not in wanted:
                continue
            value = (values or {}).get(one.path, one.default)
            holds_group = one.group is not None and isinstance(value, one.group)
            text = one.text if one.path == key else one.sentence
            if one.values and not holds_group:
                text += " " + f"[{one.values}]".replace(" ", "\xa0")  # on one line
            repeated = False
            if one.group is not None and only is None:
                first = shown.setdefault(one.group, one.path)
                repeated = first != one.path != key
                text += f" Its keys are those of {first}." if repeated else ""
            margin = "  " * one.path.count(".")
            if not margin and lines and (one.group is not None or lines[-1].startswith(" ")):
                lines.append("")
            lines.extend(_comment(text, margin))
            opens = holds_group and not repeated and not dead
            name = one.path.rpartition(".")[2]
            lines.append(
                f"{margin}{'# ' if dead else ''}{name}:{'' if opens else ' ' + as_yaml(value)}"
            )
            if one.group is not None and not repeated:
                write(_own_keys(one.group, f"{one.path}.", one.inside), dead or not holds_group)

    write(_own_keys(cls, "", None), dead=False)
    return "\n".join(lines).strip("\n") + "\n"


def _known(cls: type, key: str) -> set[str]:
    """All keys of a configuration, of which ``key`` must be one."""
    known = {one.path for one in describe(cls)}
    if key not in known:
        raise ValueError(f"{key}: no such key{did_you_mean(key, known)}")
    return known


def _with_groups(paths: Iterable[str]) -> set[str]:
    """The paths and those of the groups around them."""
    return {path[:at] for path in paths for at, c in enumerate(path + ".") if c == "."}


def _comment(text: str, margin: str) -> Iterator[str]:
    width = _WIDTH - len(margin) - 2
    for paragraph in text.split("\n\n"):
        for line in textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]:
            yield f"{margin}# {line}".replace("\xa0", " ")


_PLAIN = re.compile(r"[A-Za-z/][\w./+*\-]*( [\w./+*\-]+)*")
_NOT_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "none", "y", "n")


def as_yaml(value: Any) -> str:
    """One value on one line, as YAML 1.1 reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)
                 if getattr(value, f.name) != default_of(f)}  # fmt: skip
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {as_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)
