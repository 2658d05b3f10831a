"""How long prompts are: from the data and the tokenizers where they are here, else assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignpro.config import DataConfig, Prompting
from alignpro.data.load import is_local, load_prompts
from alignpro.models.reading import target_tokens
from alignpro.models.tokenizer import Tokenizer
from alignpro.train.micro_batches import shared_prefix
from alignpro.types import Conversation, Prompt

PROMPT_TOKENS = 256  # of a prompt in data that is not here
_BYTES_A_TOKEN = 4.0  # English text in a vocabulary of 32 to 150 thousand
_CHAT_TOKENS = (8, 6)  # of a chat template, before and after the user's words


@dataclass(frozen=True)
class Lengths:
    """Tokens that the models read for a prompt of mean length, and how many of these are shared.

    What sequences share at their beginning is computed once.
    """

    prompter: int  # read by the prompter
    prompter_shared: int  # of them, common to all prompts: template and instruction
    target: int  # read by the target, with a rewrite of the greatest length
    target_head: int  # of them, common to all rewrites of a prompt
    target_shared: int  # of them, common to all prompts
    target_raw: int  # read by the target of a raw prompt
    source: str  # where the numbers are from, for a person


def local_prompts(data: DataConfig) -> list[Prompt] | None:
    """The prompts of a source that is on this machine; None for one that would be fetched."""
    return [row.prompt for row in load_prompts(data)] if is_local(data) else None


def find_lengths(
    prompts: Sequence[Prompt] | None,
    prompting: Prompting,
    rewrite_tokens: int,
    prompter: Tokenizer | None,
    target: Tokenizer | None,
    prompt_tokens: int | None = None,
) -> Lengths:
    """Mean lengths over all prompts.

    Args:
        prompts: None where they are not here. rewrite_tokens: the most a rewrite may have.
        prompter, target: None where the tokenizer is not here; tokens are then assumed.
        prompt_tokens: of a prompt, in the place of what is found or assumed.
    """
    before, after = prompting.template.split("{prompt}")
    reads = _Turn(prompter, before, after)
    answers = _Turn(target, *prompting.target_template.split("{prompt}"))
    append = prompting.mode == "append"
    if prompt_tokens is not None or prompts is None:
        length = PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
        source = f"{length} tokens a prompt, {'assumed' if prompt_tokens is None else 'as given'}"
        turns, heads = [reads.around + length], [answers.head + length]
    else:
        conversations = [Conversation.of(prompt) for prompt in prompts]
        turns = []
        for conversation in conversations:
            whole, turn = prompting.prompter_turns(conversation)[0], conversation.last_turn
            history = whole[: -len(before + turn + after)]
            turns.append(reads.around + reads.count(history) + reads.count(turn))
        heads = [answers.head_of(conversation) for conversation in conversations]
        known = [name for name, t in (("prompter", prompter), ("target", target)) if t is None]
        source = f"mean of {len(prompts)} prompts"
        if known:
            source += f", {_BYTES_A_TOKEN:g} bytes a token where the tokenizer is not here "
            source += f"({' and '.join(known)})"
    own = round(sum(heads) / len(heads))
    head = own if append else answers.head
    separator = answers.count(prompting.separator) if append else 0
    return Lengths(
        prompter=round(sum(turns) / len(turns)),
        prompter_shared=reads.head,
        target=head + separator + rewrite_tokens + answers.tail,
        target_head=head,
        target_shared=answers.head,
        target_raw=own + answers.tail,
        source=source,
    )


class _Turn:
    """Token counts of a user turn around a text that changes."""

    def __init__(self, tokenizer: Tokenizer | None, before: str, after: str) -> None:
        self.count: Callable[[str], int] = _guess
        if tokenizer is None:
            self.head = _CHAT_TOKENS[0] + _guess(before)
            self.tail = _CHAT_TOKENS[1] + _guess(after)
        else:
            self.count = lambda text: len(tokenizer.encode(text)) if text else 0
            one, other = (
                tokenizer.encode_chat([{"role": "user", "content": before + text + after}])
                for text in ("a", "7")
            )
            self.head = shared_prefix(one, other)
            self.tail = shared_prefix(one[::-1], other[::-1])
        self.around = self.head + self.tail
        self._tokenizer, self._before, self._after = tokenizer, before, after

    def head_of(self, conversation: Conversation) -> int:
        """Tokens up to the end of its last turn."""
        if self._tokenizer is not None and conversation.history:
            turn = self._before + conversation.last_turn + self._after
            whole = conversation.with_last_turn(turn).short
            return len(target_tokens(self._tokenizer, whole)) - self.tail
        history = sum(self.around + self.count(content) for _, content in conversation.history)
        return history + self.head + self.count(conversation.last_turn)


def _guess(text: str) -> int:
    return round(len(text.encode()) / _BYTES_A_TOKEN)
