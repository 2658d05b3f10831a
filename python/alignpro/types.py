"""Data that crosses layers: dataclasses, and the protocols at the seams. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


Chat = Sequence[Message]
Texts = Sequence[str]  # of a batch, one a row
ROLES = ("system", "developer", "user", "assistant")  # of the messages of a prompt
_NOT_TEXT = (
    *("tool_calls", "function_call", "tool_call_id"),
    *("image", "images", "audio", "audios", "video", "videos"),
)


@dataclass(frozen=True)
class Conversation:
    """A prompt (x): messages of which the last is the user turn that a rewrite changes.

    Raises:
        ValueError: what is no text, a role that is none of ``ROLES``, or an empty last turn.
    """

    history: tuple[tuple[str, str], ...]  # (role, content) of the messages before
    last_turn: str

    def __post_init__(self) -> None:
        pairs = [] if isinstance(self.history, str) else self.history
        if pairs is not self.history or any(isinstance(p, (str, Mapping)) for p in pairs):
            raise ValueError(
                f"history: expected pairs of role and content, got {self.history!r:.60}; "
                "Conversation.of reads messages"
            )
        history = tuple((role, content) for role, content in pairs)
        for index, (role, content) in enumerate(history):
            if role not in ROLES:
                expected = f"expected one of the roles {', '.join(ROLES)}"
                raise ValueError(f"message {index}: {expected}, got {role!r}")
            _as_text(content, index)
        object.__setattr__(self, "history", history)
        if not isinstance(self.last_turn, str):
            raise ValueError(f"last_turn: expected text, got {type_name(self.last_turn)}")
        if not self.last_turn.strip():
            raise ValueError("expected text or a chat, got an empty string as last user turn")

    @classmethod
    def of(cls, prompt: PromptLike) -> Conversation:
        """From any form of a prompt: text is a lone user turn.

        Raises:
            ValueError: neither text nor a chat that ends in a user turn; otherwise as the class.
        """
        if isinstance(prompt, Conversation):
            return prompt
        if isinstance(prompt, str):
            return cls((), prompt)
        messages = [(m["role"], m["content"]) for m in text_messages(prompt)]
        if not messages or messages[-1][0] != "user":
            roles = [role for role, _ in messages]
            raise ValueError(f"expected a chat that ends in a user turn, got the roles {roles}")
        return cls(tuple(messages[:-1]), messages[-1][1])

    @property
    def messages(self) -> list[Message]:
        """As models and endpoints read it."""
        turns = (*self.history, ("user", self.last_turn))
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def short(self) -> Prompt:
        """The short form: a lone user turn is its text."""
        return self if self.history else self.last_turn

    @property
    def plain(self) -> str | list[Message]:
        """The short form as JSON can hold it."""
        return self.messages if self.history else self.last_turn

    @property
    def text(self) -> str:
        """For a reader of one text: a lone user turn as it is, else every turn after its role."""
        if not self.history:
            return self.last_turn
        return transcript((*self.history, ("user", self.last_turn)))

    def with_last_turn(self, text: str) -> Conversation:
        """The same history before another last turn."""
        return Conversation(self.history, text)


Prompt = str | Conversation  # text stands for a conversation of one user turn
PromptLike = Prompt | Chat


def transcript(turns: Sequence[tuple[str, str]]) -> str:
    """(role, content) as one text, every turn after its role."""
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def text_messages(chat: Any) -> list[Message]:
    """A chat with the content of every message as text; parts of text are joined by line feeds,
    as servers do for templates that take text. What else a message holds is left out.

    Raises:
        ValueError: not a list of messages with role and content, or what no text stands for: parts
            of another type, tool calls, images.
    """
    if isinstance(chat, (str, bytes, Mapping)) or not isinstance(chat, Sequence):
        raise ValueError(f"expected text or a chat, got {type_name(chat)}")
    messages: list[Message] = []
    for index, message in enumerate(chat):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            got = list(message) if isinstance(message, Mapping) else type_name(message)
            raise ValueError(f"message {index}: expected 'role' and 'content', got {got}")
        beside = [key for key in _NOT_TEXT if message.get(key)]
        if beside:
            raise ValueError(f"message {index}: expected text alone, got {beside[0]!r} beside it")
        role = message["role"]
        if not isinstance(role, str):
            raise ValueError(f"message {index}: expected text as role, got {type_name(role)}")
        messages.append({"role": role, "content": _as_text(message["content"], index)})
    return messages


def _as_text(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    expected = f"message {index}: expected text or parts of type 'text'"
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise ValueError(f"{expected}, got {type_name(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ValueError(f"{expected}, got a part of type {kind!r}")
        if not isinstance(text, str):
            raise ValueError(f"message {index}: expected text in a part, got {type_name(text)}")
        texts.append(text)
    return "\n".join(texts)


def type_name(value: Any) -> str:
    """For messages about a value that came from JSON."""
    return "nothing (null)" if value is None else type(value).__name__


def not_unicode(text: str) -> str | None:
    """Why UTF-8 cannot express a text; None where it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X} at character {error.start}"
        return f"lone surrogate {surrogate}; expected valid Unicode"
    return None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Defaults: the model's own distribution, 64 new tokens.

    Log-probabilities are always those of the model's own distribution at ``temperature``; top-k,
    top-p, min-p and the penalties change what may be drawn, and the mass that the first three kept
    is reported. Penalties (the first is Keskar et al. 2019's) are the CPU's and an endpoint's.
    """

    temperature: float = 1.0
    """The sampling temperature; 0 is greedy, with log-probabilities at temperature 1."""
    top_k: int = 0
    """How many of the likeliest tokens may be drawn; 0 is all."""
    top_p: float = 1.0
    """The probability mass of the likeliest tokens that may be drawn; 1 is all."""
    min_p: float = 0.0
    """The share of the likeliest token's probability that a token needs to be drawn; 0 is off."""
    max_new_tokens: int = 64
    """The most tokens that are written."""
    min_new_tokens: int = 0
    """The tokens that are written before the end or a stop token may be drawn."""
    n: int = 1
    """Samples of a prompt, which is computed once."""
    seed: int | None = None
    """The random seed; null is fresh randomness for every prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, and are cut from it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion."""
    ignore_eos: bool = False
    """Whether the model's end of text is written like any other token."""
    repetition_penalty: float = 1.0
    """What the positive logits of tokens that were read or written are divided by, and the negative
    ones multiplied with; 1 is off."""
    presence_penalty: float = 0.0
    """What is taken from the logits of tokens that were written."""
    frequency_penalty: float = 0.0
    """What is taken from the logits of written tokens for every time that they were."""
    deadline_seconds: float | None = None
    """Seconds from submission after which what was written is returned; null waits for all."""


@dataclass(frozen=True)
class Usage:
    """What an endpoint says that an answer took, and its price where there is one."""

    input_tokens: int = 0
    output_tokens: int = 0  # reasoning included
    cost: float | None = None

    def __add__(self, other: Usage) -> Usage:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            sum(costs) if costs else None,
        )


@dataclass(frozen=True)
class Completion:
    """What a model wrote. Lists are aligned with ``tokens``; a final EOS is among them. Of a model
    behind an endpoint they are empty, and ``usage`` is there."""

    tokens: list[int]
    text: str
    logprobs: list[float]
    kept_mass: list[float]
    finish_reason: FinishReason
    prompt_tokens: list[int]
    reasoning: str = ""  # written before ``text``, and no part of it
    usage: Usage | None = None
    answered: bool = True  # False: it is a block of reasoning alone, which no answer follows

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) if self.usage is None else self.usage.output_tokens


@dataclass(frozen=True)
class Response:
    """One answer of the target (y). Of a target behind an endpoint, ``tokens`` and what is aligned
    with them are empty, and ``usage`` is there."""

    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason
    reward: float = float("nan")
    kept_mass: list[float] = field(default_factory=list)  # by truncation; empty where not told
    reasoning: str = ""
    usage: Usage | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) if self.usage is None else self.usage.output_tokens


@dataclass(frozen=True)
class Rewrite:
    """One rewrite (x') with everything that was sampled around it."""

    prompt_index: int  # into the rollout's prompts
    prompter_tokens: list[int]  # what the prompter read
    tokens: list[int]  # what it wrote, EOS included
    logprobs: list[float]  # of ``tokens``, at the sampling temperature
    text: str
    target_prompt: Prompt  # what the target read: its last turn is x' or has x' appended
    target_tokens: list[int]  # the same as token ids, chat template applied; none of an endpoint
    finish_reason: FinishReason
    responses: list[Response] = field(default_factory=list)  # those that failed are left out
    reasoning: str = ""  # written before ``text``, and no part of it; a cut one leaves no text

    @property
    def reward(self) -> float:
        """Mean over the responses: the unbiased estimate of R(x, x') = E_y[r(x, y)]; NaN, and no
        reward, where there are none."""
        rewards = [r.reward for r in self.responses]
        return sum(rewards) / len(rewards) if rewards else float("nan")

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        plain = asdict(self) | {"target_prompt": Conversation.of(self.target_prompt).plain}
        for response in plain["responses"]:
            if response["reward"] != response["reward"]:  # NaN: not scored
                del response["reward"]
        return plain

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Rewrite:
        """What `to_plain` made of it."""

        def response(fields: Mapping[str, Any]) -> Response:
            usage = fields.get("usage")
            return Response(**{**fields, "usage": None if usage is None else Usage(**usage)})

        responses = [response(r) for r in plain["responses"]]
        read = Conversation.of(plain["target_prompt"]).short
        return cls(**{**plain, "target_prompt": read, "responses": responses})


@dataclass(frozen=True)
class Rollout:
    """N rewrites a prompt, M responses a rewrite, each scored against the original prompt. A
    response that failed is left out of its rewrite, which stays."""

    prompts: list[Prompt]
    rewrites: list[list[Rewrite]]  # [prompts][N]
    seconds: dict[str, float]  # wall time by stage: "generate", "reward"
    generated_tokens: int  # prompter and target together
    common_draws: bool = False  # a prompt's rewrites share draws, so their noise is not independent
    failed: list[str] = field(default_factory=list)  # of each response that is left out: the reason
    unscored: int = 0  # responses left out since the reward gave them no score (None)


@runtime_checkable
class Reward(Protocol):
    """Scores responses against the *original* prompts: aligned lists in, one float each out, or
    None for no score.

    ``prompts`` are the last user turns. The whole conversations, as lists of messages, are given as
    ``conversations``: always to a reward that names this parameter, and to one that takes all
    columns where a prompt has more messages than one.
    """

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> Sequence[float | None]: ...


class AnswerScorer(Protocol):
    """What rewards may ask of the frozen target beside its responses; pipelines pass it on."""

    @property
    def name(self) -> str: ...

    @property
    def tells_logprobs(self) -> bool:
        """Whether responses come with the log-probabilities that they were drawn with."""

    @property
    def scores_answers(self) -> bool:
        """Whether it can be called."""

    def unread_by(self, params: SamplingParams) -> Callable[[Prompt | None], str | None]:
        """Why a prompt cannot be read with an answer that is drawn by ``params``; None where it
        can."""

    def __call__(self, prompts: Sequence[Prompt | None], answers: Texts) -> list[float]:
        """log p(answer | prompt) at temperature 1, in nats, the mean per token of each row; None
        reads an empty turn, and an empty answer has 0."""
