"""What an endpoint replies: the answer, the reasoning before it, what both took, and what it tells
of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignpro.models.language_model import RequestError
from alignpro.models.reasoning import no_answer, split_reasoning
from alignpro.types import FinishReason

# What endpoints call the end of an answer, beside OpenAI's own "length", "stop" and
# "content_filter": Mistral, Google's and Anthropic's models behind such endpoints, and TGI.
_CUT = ("length", "max_tokens", "model_length")
_ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # an empty answer may be meant
_FILTERED = ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii")


@dataclass(frozen=True)
class Answer:
    text: str
    reasoning: str
    finish_reason: FinishReason
    input_tokens: int | None  # None: the endpoint does not say
    output_tokens: int | None  # reasoning included
    # Where they were asked for and told: log-probabilities of all that was written (of a call that
    # scores, of the given tokens but the first), its tokens, and those that were read.
    logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)


def read_reply(reply: object) -> Answer:
    """The first choice of a chat completion.

    Raises:
        ValueError: it is no chat completion. RequestError: it is one without an answer.
    """
    choice = _at(_at(reply, "choices"), 0)
    message = _at(choice, "message")
    if not isinstance(message, Mapping):
        raise ValueError(f"expected choices with a message, got {one_line(reply)}")
    ended = choice.get("finish_reason")
    said = ended.lower() if isinstance(ended, str) else ended
    content, thought = _texts(message.get("content"))
    # OpenAI's place for the words of a refusal, which are what a person reads.
    content = content or _texts(message.get("refusal"))[0] or content
    told = [_texts(message.get(name))[0] for name in ("reasoning_content", "reasoning")]
    reasoning = next(filter(None, told), thought)
    answer, block = (None, "") if content is None else split_reasoning(content)
    reasoning = reasoning or block
    if said in ("error", "abort"):  # OpenRouter's and vLLM's words for an answer that broke off
        raise ValueError(f"an answer that broke off (finish_reason {ended})")
    if said in _FILTERED:
        raise RequestError(f"no answer: the endpoint's content filter cut it ({ended})")
    finish_reason: FinishReason = "length" if said in _CUT else "stop"
    if not answer and message.get("tool_calls"):
        raise RequestError(f"no answer: the reply is a tool call (finish_reason {ended})")
    if content is None and not reasoning and finish_reason == "stop":
        raise ValueError(f"expected text in the message, got {one_line(message)}")
    missing = no_answer(answer, reasoning, finish_reason)
    if missing is None and not answer and said not in _ENDED:
        missing = f"no answer: the reply is empty (finish_reason {ended})"
    if missing is not None:
        raise RequestError(missing)
    read, written = read_usage(reply)
    logprobs, tokens = _of_tokens(choice)
    prompt_tokens = _whole_numbers(_at(reply, "prompt_token_ids"))
    return Answer(
        *(answer or "", reasoning, finish_reason, read, written), logprobs, tokens, prompt_tokens
    )


def read_scores(reply: object, count: int) -> Answer:
    """The log-probabilities of ``count`` given tokens but the first, of a completion that echoes.

    Raises:
        ValueError: it is no completion. RequestError: it is one that does not tell them.
    """
    choice = _at(_at(reply, "choices"), 0)
    if not isinstance(choice, Mapping):
        raise ValueError(f"expected choices, got {one_line(reply)}")
    told = _at(_at(choice, "logprobs"), "token_logprobs")
    given = told[1:count] if isinstance(told, list) and len(told) >= count else []
    if len(given) != count - 1 or not all(_is_logprob(value) for value in given):
        raise RequestError("the endpoint tells no log-probabilities of given tokens (echo)")
    read, _ = read_usage(reply)
    if read not in (None, count):
        raise RequestError(f"the endpoint read {read} tokens of the {count} that were given")
    return Answer("", "", "stop", read, 1, [float(value) for value in given])


def read_usage(reply: object) -> tuple[int | None, int | None]:
    """(tokens read, tokens written), where a reply says them."""
    usage = _at(reply, "usage")
    return _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")


def one_line(value: object) -> str:
    """At most 200 characters of it."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _at(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _of_tokens(choice: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    """(log-probabilities, tokens) of what was written; empty where they are not told for all of
    it. vLLM tells ids beside the choice, llama.cpp in every entry."""
    entries = _at(choice.get("logprobs"), "content")
    if not isinstance(entries, list):
        return [], []
    logprobs = [_at(entry, "logprob") for entry in entries]
    if not all(_is_logprob(value) for value in logprobs):
        return [], []
    tokens = _whole_numbers(choice.get("token_ids") or [_at(entry, "id") for entry in entries])
    if len(tokens) != len(logprobs):
        tokens = []
    return [float(value) for value in logprobs], tokens


def _whole_numbers(values: object) -> list[int]:
    """The list; empty where there is none, or anything else in it."""
    return values if isinstance(values, list) and all(type(v) is int for v in values) else []


def _is_logprob(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0


def _texts(content: object) -> tuple[str | None, str]:
    """(text, reasoning) of a text, or of a list of parts; None where there is no text."""
    if not isinstance(content, list):
        return (_unicode(content), "") if isinstance(content, str) else (None, "")
    texts, thoughts = [], []
    for part in content:
        kind = _at(part, "type")
        if kind in ("thinking", "reasoning"):  # Mistral's parts hold parts
            thoughts.append(_texts(_at(part, kind) or _at(part, "text"))[0])
        elif isinstance(part, str):
            texts.append(part)
        else:
            texts.append(_at(part, "text") or _at(part, "refusal"))
    found = [_unicode(text) for text in texts if isinstance(text, str)]
    return "".join(found) if found else None, "".join(filter(None, thoughts))


def _unicode(text: str) -> str:
    """JSON can say half of a surrogate pair, which is no text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if type(value) is int and value >= 0 else None
