"""Text to token ids and back. Text from outside never becomes a control token (contract 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro import native, trace
from alignpro.models import chat_template
from alignpro.models.chat_template import today
from alignpro.models.gguf_vocabulary import read_gguf
from alignpro.models.vocabulary import AddedToken, Vocabulary, read_folder
from alignpro.types import Chat, not_unicode

if TYPE_CHECKING:
    from alignpro.native import core

_CHARACTERS = 16  # that are encoded first, for every token that is of interest


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer(Vocabulary):
    """A model's tokenizer with its chat template. Immutable; any number of threads may use it."""

    chat_template: str | None = None  # the text that chats are rendered by; None: the default's
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # its variables
    date: str = field(default_factory=today)  # what it is told, in ISO 8601

    @classmethod
    def of(cls, files: core.ModelFiles) -> Tokenizer:
        """A model's own. Raises ModelFileError."""
        metadata = files.metadata()
        if metadata is None:
            return cls(**vars(read_folder(files)))
        return cls(**vars(read_gguf(metadata, files.path, files.eos_ids())))

    def with_template(
        self,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> Tokenizer:
        """The same vocabulary, whose chats are written otherwise.

        Args:
            template: a name among ``chat_templates``, a file, or the text of one; None: "default".
            variables: what the template reads beside the chat, such as ``enable_thinking``.
            date: what `strftime_now` writes; None: today's, here and now.

        Raises:
            ValueError: no such template, or one that does not compile; a variable that it does not
                read. OSError: a file that cannot be read.
        """
        chosen = chat_template.choose(self.chat_templates, template)
        if variables or template is not None:
            chat_template.check_variables(self._require(chosen), variables or {})
        return replace(
            self,
            chat_template=chosen,
            chat_template_kwargs=dict(variables or {}),
            date=date or today(),
        )

    @property
    def template_settings(self) -> tuple[str | None, Mapping[str, Any], str]:
        """What `encode_chat` depends on beside the chat and the vocabulary."""
        return self._template, self.chat_template_kwargs, self.date

    @property
    def _template(self) -> str | None:
        return self.chat_template or self.chat_templates.get("default")

    def _require(self, template: str | None) -> str:
        if template is not None:
            return template
        named = ", ".join(sorted(self.chat_templates))
        if named:
            raise ValueError(
                f'{self.source} has chat templates {named}, none called "default"; chat_template '
                "says which"
            )
        raise ValueError(
            f"{self.source} has no chat template; chat_template takes one (a file, or its text), "
            "or encode the prompt yourself and pass token ids"
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json. Raises ModelFileError."""
        return cls.of(native.core.ModelFiles(str(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF metadata") -> Tokenizer:
        """From the metadata of a GGUF file called ``source``. Raises ModelFileError."""
        return cls(**vars(read_gguf(metadata, source)))

    def encode(self, text: str, *, add_bos: bool = False, most: int | None = None) -> list[int]:
        """Token ids of plain text; "<|im_end|>" in it is ten characters, never a control id. Added
        tokens that are not special (runs of spaces, <think>) are words of the vocabulary: they are
        matched wherever they stand, as the model was trained.

        most: tokens that are of interest. A text that has more than twice as many may be encoded
            only so far that it shows (`count_words` says as much): 10 MB take seconds.

        Raises:
            ValueError: not a string, a lone surrogate, or ``add_bos`` where the model has no BOS.
        """
        _check_text(text, "text")
        ids = self._ids(text, self._plain_pattern, lambda part: part, most)
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError(f"add_bos: {self.source} has no BOS token")
        return [self.bos_id, *ids]

    def encode_chat(
        self, messages: Chat, *, add_generation_prompt: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids of a chat in the template. Control tokens come from it alone, and from its
        variables: such text in a message, its role included, is encoded as ordinary characters.
        Added tokens that are no control tokens are matched in messages as in `encode`, whose
        ``most`` it is.

        Raises:
            ValueError: not a list of {"role": str, "content": str}, a lone surrogate, a model
                without a template, or a template that refuses the chat or leaves a message out.
        """
        _check_chat(messages)
        text, restore = self._written(messages, add_generation_prompt)
        with trace.span("tokens"):
            return self._ids(text, self._pattern, restore, most)

    def encode_around(
        self, messages: Chat, separator: str, most: int | None = None
    ) -> tuple[list[int], list[int]]:
        """(before, behind): `encode_chat` of what comes before and behind a place at the end of the
        last user turn, ``separator`` being the end of what is before. most: of either.

        Raises:
            ValueError: as `encode_chat`; no turn of the user, or a template that cuts it.
        """
        _check_chat(messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError("chat: expected a turn of the user, at whose end a soft prompt stands")
        mark = next(chat_template.unused_characters(messages, self._require(self._template)))
        marked: list[dict[str, Any]] = [dict(message) for message in messages]
        marked[users[-1]]["content"] += separator + mark
        text, restore = self._written(marked, True)
        before, *behind = text.split(mark)
        if len(behind) != 1:
            raise ValueError(
                f"{self.source}: its chat template makes another text of a user's turn"
            )
        with trace.span("tokens"):
            return (
                self._ids(before, self._pattern, restore, most),
                self._ids(behind[0], self._pattern, restore, most, continued=True),
            )

    def _written(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[str, Callable[[str], str]]:
        """The chat in its template, shielded, and what restores a part of it."""
        shielded, restore = chat_template.shield(
            messages, self._special_pattern, self._require(self._template)
        )
        left_out = self._left_out(tuple(message["role"] for message in messages))
        if left_out is not None:
            raise ValueError(
                f"{self.source}: its chat template leaves out {left_out}; chat_template takes "
                "another template (a file, or its text)"
            )
        with trace.span("template"):
            return self._render(shielded, add_generation_prompt), restore

    @cached_property
    def _left_out(self) -> Callable[[tuple[str, ...]], str | None]:
        """What of a chat of such roles does not stand in its text, in words: jinja writes nothing
        for a key of another name, and templates pass over roles that they do not know, without a
        word. None: all of it does, or it is refused."""

        @lru_cache(maxsize=1024)  # a server is sent any
        def left_out(roles: tuple[str, ...]) -> str | None:
            marks = [f"\ue000{index}\ue000" for index in range(len(roles))]
            chat = [{"role": r, "content": c} for r, c in zip(roles, marks, strict=True)]
            try:
                text = self._render(chat, True)
            except ValueError:  # refused for another reason, which the chat itself will show
                return None
            missing = next((index for index, mark in enumerate(marks) if mark not in text), None)
            if missing is None:
                return None
            if len(roles) == 1:
                return "what the user says: it reads no message.content as text"
            return f"message {missing} (role {roles[missing]!r})"

        return left_out

    def around_turn(self) -> tuple[str, str, bool]:
        """(before, after, strips): what the template writes around a chat of one user turn, and
        whether it leaves out the white space at the turn's ends.

        Raises:
            ValueError: no template, or one that makes another text of the turn.
        """
        mark = "\ue000"
        before, *after = self._render([{"role": "user", "content": mark}], True).split(mark)
        if len(after) == 1:
            for strips in (False, True):
                probes = ("a", " \n b. \n\n", "\ta <b>\n\n c {{ d }} </e> ")
                if all(
                    self._render([{"role": "user", "content": probe}], True)
                    == before + (probe.strip() if strips else probe) + after[0]
                    for probe in probes
                ):
                    return before, after[0], strips
        raise ValueError(f"{self.source}: its chat template makes another text of a user's turn")

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return chat_template.render(
            self._require(self._template),
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **self.chat_template_kwargs},
            date=self.date,
        )

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, unused ids nothing.

        Raises:
            ValueError: a negative id.
        """
        text = self.join_bytes(tokens, skip_special=skip_special).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def join_bytes(self, tokens: Sequence[int], *, skip_special: bool = True) -> bytes:
        """The bytes of the text of token ids, with the leading space that `decode` may strip."""
        if tokens and min(tokens) < 0:
            raise ValueError(f"tokens: expected ids of 0 and more, got {min(tokens)}")
        pieces, special = self._pieces, {} if skip_special else self._special_bytes
        return b"".join(
            special.get(token) or pieces[token] for token in tokens if token < len(pieces)
        )

    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, [vocab_size]; b"" for special tokens and unused ids."""
        return list(self._pieces)

    @cached_property
    def _special_bytes(self) -> dict[int, bytes]:
        return {t.id: t.text.encode("utf-8") for t in self.added if t.hidden}

    @cached_property
    def _by_text(self) -> dict[str, AddedToken]:
        return {token.text: token for token in self.added}

    @cached_property
    def _pattern(self) -> Any:
        return chat_template.control_pattern(t.text for t in self.added if not t.normalized)

    @cached_property
    def _special_pattern(self) -> Any:
        return chat_template.control_pattern(t.text for t in self.added if t.control)

    @cached_property
    def _plain_pattern(self) -> Any:
        return chat_template.control_pattern(
            t.text for t in self.added if not (t.control or t.normalized)
        )

    def _ids(
        self,
        text: str,
        pattern: Any,
        restore: Callable[[str], str],
        most: int | None = None,
        *,
        continued: bool = False,
    ) -> list[int]:
        """Ids of a text with the added tokens that ``pattern`` matches.

        restore: undoes in what lies between them what kept other tokens from being matched.
        continued: the text goes on with another.
        """
        ids: list[int] = []
        backend = self.continuation if continued else self.backend
        for part in self._split(text, pattern):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            elif part:
                ids += _encode(backend, restore(part), most)
            if most is not None and len(ids) > 2 * most:
                break
            backend = self.continuation
        return ids

    def _split(self, text: str, pattern: Any) -> Iterator[str | AddedToken]:
        """The text cut at added tokens; a token may swallow the white space at its sides."""
        begin = at = 0
        while pattern is not None and (match := pattern.search(text, at)):
            token = self._by_text[match.group()]
            sides = (
                text[max(match.start() - 1, 0) : match.start()]
                + text[match.end() : match.end() + 1]
            )
            if token.single_word and any(char.isalnum() or char == "_" for char in sides):
                at = match.start() + 1
                continue
            before = text[begin : match.start()]
            yield before.rstrip() if token.lstrip else before
            yield token
            begin = match.end()
            while token.rstrip and begin < len(text) and text[begin].isspace():
                begin += 1
            at = begin
        yield text[begin:]


def _encode(backend: Any, text: str, most: int | None) -> list[int]:
    """All ids, or those of a beginning that has more than twice ``most``. What follows a beginning
    changes at most how its last words are cut, and twice leaves room for that."""
    size = len(text) if most is None else _CHARACTERS * max(1, most)
    while True:
        ids: list[int] = backend.encode(text[:size], add_special_tokens=False).ids
        if size >= len(text) or (most is not None and len(ids) > 2 * most):
            return ids
        size *= 4


def count_words(tokens: int, most: int) -> str:
    """A count of tokens for a person, of what was encoded with ``most``."""
    return f"more than {2 * most} tokens" if tokens > 2 * most else f"{tokens} tokens"


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what}: expected text, got {type(text).__name__}")
    wrong = not_unicode(text)
    if wrong is not None:
        raise ValueError(f"{what}: {wrong}")


def _check_chat(messages: Any) -> None:
    form = 'expected a list of {"role": ..., "content": ...}'
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"chat: {form}, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"chat: {form}, got an empty one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            got = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"message {index}: {form}, got {got}")
        for key in ("role", "content"):
            _check_text(message[key], f"message {index}: {key}")
