"""A chat as text: the model's jinja template, rendered in a sandbox, with control text kept apart.

The template writes control tokens as text ("<|im_end|>"), and a user may write the same. Before
rendering, every such run in the messages is broken with a private character that occurs nowhere
else; what still reads as a control token afterwards was written by the template (contract 7).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

# What `render` itself says; no variable may.
_OURS = ("messages", "add_generation_prompt", "strftime_now", "raise_exception")


def today() -> str:
    """The date that a template is told where none is given: of a run, or of a loaded model, it is
    one, however long that lasts."""
    return datetime.now().date().isoformat()


def choose(named: Mapping[str, str], wanted: str | None) -> str | None:
    """The template to use; None where there is none that is meant.

    Args:
        named: those of a model's files. wanted: a name among them, a file, or the text of another;
            None is the one called "default".

    Raises:
        ValueError: none of these. OSError: a file that cannot be read.
    """
    if wanted is None or wanted in named:
        return named.get(wanted or "default")
    if "{" in wanted or "\n" in wanted:
        return wanted
    path = Path(wanted).expanduser()
    if not path.is_file():
        there = ", ".join(sorted(named)) or "none"
        raise ValueError(
            f"chat_template: expected a name (this model has {there}), a file, or the text of a "
            f"template, got {wanted!r}"
        )
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: {path}: expected UTF-8 text: {error}") from None


def check_variables(template: str, variables: Iterable[str]) -> None:
    """Refuse what a template does not read.

    Raises:
        ValueError: such a variable, or a template that does not compile.
    """
    from jinja2 import meta

    source = _compiled(template).environment.parse(template)
    reads = meta.find_undeclared_variables(source) - {*_OURS}
    for name in variables:
        if name in _OURS:
            raise ValueError(f"chat_template_kwargs: alignpro sets {name} itself")
        if name not in reads:
            raise ValueError(
                f"chat_template_kwargs: the template reads no {name}; it reads "
                f"{', '.join(sorted(reads)) or 'none'}"
            )


def control_pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of ``texts``, the longest at its place; None for none.

    The alternatives are folded into a trie, so a scan costs the same for 3 tokens and for 256.
    """
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_branch(trie)) if trie else None


def shield(
    messages: Sequence[Mapping[str, Any]], pattern: re.Pattern[str] | None, avoid: str
) -> tuple[list[dict[str, Any]], Callable[[str], str]]:
    """The messages with every control text in them broken, and the function that restores a text.

    Args:
        pattern: of `control_pattern`. avoid: text whose characters must not serve as marks.
    """
    if pattern is None:
        return [dict(m) for m in messages], lambda text: text
    private = unused_characters(messages, avoid)

    def mark_for(original: str) -> str:
        """A fresh private character that stands for ``original``."""
        mark = next(private)
        undo[ord(mark)] = original
        return mark

    undo: dict[int, str] = {}
    gap = mark_for("")
    stand_ins: dict[str, str] = {}  # for control tokens of one character, which no gap breaks

    def broken(text: str) -> str:
        parts, begin = [], 0
        while match := pattern.search(text, begin):
            first = match.start()
            char = text[first]
            parts.append(text[begin:first])
            if pattern.fullmatch(char) is None:
                parts.append(char + gap)
            else:
                if char not in stand_ins:
                    stand_ins[char] = mark_for(char)
                parts.append(stand_ins[char])
            begin = first + 1
        return "".join([*parts, text[begin:]])

    return _each_string(messages, broken), lambda text: text.translate(undo)


def unused_characters(messages: Sequence[Mapping[str, Any]], avoid: str) -> Iterator[str]:
    """Private-use characters that are neither in the messages nor in ``avoid``. Raises ValueError
    where there is none left."""
    used = set(avoid)

    def note(text: str) -> str:
        used.update(text)
        return text

    _each_string(messages, note)
    yield from (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in used)
    raise ValueError("messages: every private-use character occurs; at least one must not")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    date: str,
) -> str:
    """The template's text for a chat.

    Args:
        variables: the special tokens by name ("bos_token", "eos_token", ...), and others.
        date: what `strftime_now` writes, in ISO 8601; of a day alone the hour is midnight.

    Raises:
        ValueError: the template does not compile, refuses the chat or fails on it.
    """
    compiled = _compiled(template)
    given = {"tools": None, "documents": None, **variables}
    try:
        return compiled.render(
            given,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            strftime_now=datetime.fromisoformat(date).strftime,
        )
    except Exception as error:  # a template is a program from a file: it may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"chat template: {reason}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # jinja2 is a tenth of a second to import, and a completion of token ids needs none of it.
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training masks; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            body: list[jinja2.nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"chat template: it does not compile ({' '.join(str(error).split())}); chat_template "
            "takes another: a name, a file or the text"
        ) from error


def _branch(node: Mapping[str, Any]) -> str:
    ends = "" in node
    branches = [re.escape(char) + _branch(child) for char, child in node.items() if char]
    if not branches:
        return ""
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if ends else ''}"


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and mappings with every string value replaced."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_string(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_each_string(item, change) for item in value]
    return value
