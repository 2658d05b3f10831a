"""Data that crosses layers: dataclasses, and the protocols at the seams. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


Chat = Sequence[Message]
Texts = Sequence[str]  # of a batch, one a row


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Defaults: the model's own distribution, 64 new tokens.

    Log-probabilities are always those of the untruncated distribution at ``temperature``;
    top-k, top-p and min-p change what may be drawn, and the mass they kept is reported.
    """

    temperature: float = 1.0  # 0: greedy, log-probabilities then at temperature 1
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    max_new_tokens: int = 64
    min_new_tokens: int = 0  # EOS and stop ids are not drawn before
    n: int = 1  # samples per prompt; the prompt is computed once
    seed: int | None = None  # None: fresh randomness for every prompt
    stop: tuple[str, ...] = ()  # text that ends a completion; it is cut from ``text``
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    deadline_seconds: float | None = None  # from submission; what was written by then is returned


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
    target_prompt: str  # the user turn the target read: the rewrite, or the prompt with it appended
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


@dataclass(frozen=True)
class Rollout:
    """N rewrites a prompt, M responses a rewrite, each scored against the original prompt. A
    response that failed is left out of its rewrite, which stays."""

    prompts: list[str]
    rewrites: list[list[Rewrite]]  # [prompts][N]
    seconds: dict[str, float]  # wall time by stage: "generate", "reward"
    generated_tokens: int  # prompter and target together
    common_draws: bool = False  # a prompt's rewrites share draws, so their noise is not independent
    failed: list[str] = field(default_factory=list)  # of each response that is left out: the reason


@runtime_checkable
class Reward(Protocol):
    """Scores responses against the *original* prompts: aligned lists in, one float each out."""

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> Sequence[float]: ...
