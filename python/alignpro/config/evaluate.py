"""Evaluation on held-out prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from alignpro.config.data import HELD_OUT, DataConfig, InstructionsConfig
from alignpro.config.endpoint import Budget, ClientConfig, check_url
from alignpro.config.fields import (
    Range,
    Seed,
    Threads,
    above,
    at_least,
    checked,
    only_default,
    require,
)
from alignpro.config.model import PROMPTER, ModelConfig, check_local
from alignpro.config.prompting import RESPONSE, REWRITE, Prompting, StageConfig
from alignpro.types import SamplingParams

# Every arm that there can be and what a report calls it, in the order of reading.
ARMS = {
    "raw": "raw prompt",
    "static": "static instruction",
    "policy_text": "policy text",
    "untuned": "untuned prompter",
    "trained": "trained prompter",
    "labelled": "labelled rule",
    "optimum": "resampled optimum",
    "tuned": "tuned target",
}
_REQUIREMENT = re.compile(r"\s*(\w+)\s*>\s*(\w+)\s*(?:([+-])\s*(\d+(?:\.\d*)?|\.\d+))?\s*")


class Requirement(NamedTuple):
    """``left - right`` is to lie above ``margin`` with its whole paired 95% interval."""

    left: str
    right: str
    margin: float


def read_requirement(text: str, arms: Collection[str] = ARMS) -> Requirement:
    """ "trained>static+0.05" as what it says. Raises ValueError unless both are of ``arms``."""
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"require: expected ARM>ARM or ARM>ARM+MARGIN, got {text!r}")
    left, right, sign, margin = match.groups()
    for name in (left, right):
        if name not in arms:
            close = difflib.get_close_matches(name, arms, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise ValueError(
                f"require: {text}: expected one of the arms {', '.join(arms)}, got {name!r}{hint}"
            )
    if left == right:
        raise ValueError(f"require: {text}: expected two arms, got one twice")
    return Requirement(left, right, float((sign or "") + (margin or "0")))


@dataclass(frozen=True)
@checked
class StaticSearch:
    """Search for the best fixed instruction on training prompts, by successive halving."""

    data: DataConfig = field(default_factory=DataConfig)
    """The prompts that the search may see; one that is held out as well is refused."""
    instructions: InstructionsConfig | None = field(default_factory=InstructionsConfig)
    """The candidates; null takes none from a source."""
    candidates: tuple[str, ...] = ()  # more of them, your own
    # Candidates that each of the writers writes for training prompts; 0: none.
    num_written: Annotated[int, at_least(0)] = 32
    # What the trained prompter writes comes from the training: with it, the search stands on what
    # the training found. A static arm that owes nothing to the training has no "trained" here.
    writers: tuple[Literal["untuned", "trained"], ...] = ("untuned", "trained")
    # The best so many are joined two by two, in both orders ("A B" and "B A"), and the second half
    # of the budget goes to a search among them and these; 0: none.
    joined: Annotated[int, at_least(0)] = 0
    budget: Annotated[int, at_least(1)] = 2048  # responses of the whole search
    # Tokens of the target instead, of the whole search. auto: as many as the training used, by the
    # metrics.jsonl of the run that `trained` lies in.
    budget_tokens: Annotated[int, at_least(1)] | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if self.budget_tokens is not None:
            only_default(self, "budget", "without budget_tokens")
        blank = [text for text in self.candidates if not text.strip()]
        require("candidates", self.candidates, not blank, "instructions, none of them empty")
        require(
            "candidates",
            self.candidates,
            bool(self.candidates or self.instructions or self.num_written),
            "at least one, where neither instructions nor num_written gives any",
        )


@dataclass(frozen=True)
@checked
class Labelled:
    """An instruction a row, by a label that no prompter reads: the rules as they are written.

    It is no ceiling: a prompter may find better words for a rule.
    """

    column: str = "kind"  # of the data: the label of each row
    # Label to instruction; an empty one leaves the prompt as it is. None: the column holds the
    # instructions themselves.
    instructions: dict[str, str] | None = None


@dataclass(frozen=True)
@checked
class OptimumConfig:
    """The optimum of the objective by resampling what the untuned prompter writes."""

    # Rewrites a prompt that the optimum is resampled from.
    num_candidates: Annotated[int, at_least(2)] = 16
    # Responses a candidate: their mean reward is its weight's exponent. Measured on SmolLM2: with
    # one, the arm keeps the untuned prompter's reward; with four, a third of the spread between
    # the candidates' means is R's own.
    num_responses: Annotated[int, at_least(1)] = 4


@dataclass(frozen=True)
@checked
class JudgeConfig:
    """Who says which of two responses is better, and how it is asked."""

    # A local model, or the endpoint's name for its model: then its name, with template variables.
    model: ModelConfig = field(default_factory=ModelConfig)
    base_url: str | None = None  # an OpenAI-compatible endpoint, "https://.../v1"; None: local
    # The environment variable that holds the key, which is never stored. None: there is no key.
    api_key_env: str | None = "OPENAI_API_KEY"
    num_prompts: Annotated[int, at_least(2)] | None = None  # the first so many; None: all
    num_pairs: Annotated[int, at_least(1)] = 1  # pairs of responses a prompt
    cache: str | None = None  # JSONL of verdicts; None: beside the output file
    # Share of questions that may stay without a verdict.
    max_failed: Annotated[float, Range(lambda v: 0 <= v < 1, "at least 0 and below 1")] = 0.02
    # Of an endpoint; the rest of its client has the defaults of `ClientConfig`.
    concurrency: Annotated[int, at_least(1)] = 8  # questions under way at once
    timeout_seconds: Annotated[float, above(0)] = 60.0  # for one attempt
    # After 429, 5xx, a timeout, a broken connection or a reply that is none.
    max_retries: Annotated[int, at_least(0)] = 4
    budget: Budget = field(default_factory=Budget)  # of calls and tokens; the judge then fails
    temperature: Annotated[float, at_least(0)] | None = 0.0  # None: leave it to the endpoint
    # Of the reply; None: leave it to the endpoint.
    max_tokens: Annotated[int, at_least(1)] | None = 16

    def __post_init__(self) -> None:
        named = bool((self.model.model or "").strip())
        require("model", self.model.model, named, "the judge's path or name")
        require("model.adapter", self.model.adapter, self.model.adapter is None, "null")
        if self.base_url is not None:
            check_url("base_url", self.base_url)
            variables = self.model.chat_template_kwargs
            alone = self.model == ModelConfig(self.model.model, chat_template_kwargs=variables)
            require("model", self.model, alone, "a name and chat_template_kwargs, with base_url")
        check_local("model", self.model, "base_url is the judge's endpoint")

    @property
    def asked(self) -> ModelConfig:
        """The model that is asked, as a group of its own."""
        if self.base_url is None:
            return self.model
        return ModelConfig(
            self.model.model,
            endpoint=self.base_url,
            api_key_env=self.api_key_env,
            chat_template_kwargs=self.model.chat_template_kwargs,
            client=ClientConfig(
                concurrency=self.concurrency,
                timeout_seconds=self.timeout_seconds,
                max_retries=self.max_retries,
                budget=self.budget,
                body={"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": None},
            ),
        )


@dataclass(frozen=True)
@checked
class EvalConfig(StageConfig):
    """The arms of an evaluation on held-out prompts; each group that is null leaves its arm out."""

    prompter: ModelConfig = PROMPTER  # its adapter: the untuned arm's, None: the base model
    target: ModelConfig | None = None  # frozen; None: the prompter's base weights
    trained: str | None = None  # PEFT folder; None: no trained arm
    tuned: str | None = None  # PEFT folder of the target, tuned by the same reward: the oracle
    # One instruction for every prompt: the text itself, or how to search for it; {} takes the
    # defaults, here and in the other groups.
    static: str | StaticSearch | None = None
    # A whole policy as one conditional text ("If it is a question, ..."), behind every prompt.
    policy_text: str | None = None
    labelled: Labelled | None = None
    optimum: OptimumConfig | None = None
    # Of the optimum; what the prompter was trained with.
    kl_coef: Annotated[float, above(0)] = 0.05
    judge: JudgeConfig | None = None
    data: DataConfig = HELD_OUT
    """The prompts."""
    reward: str = "vader+0.2*topic"
    seed: Seed = 0
    num_prompts: Annotated[int, at_least(2)] | None = None  # the first so many rows; None: all
    # Rewrites a prompt; an arm without any gets as many responses.
    num_rewrites: Annotated[int, at_least(1)] = 4
    num_responses: Annotated[int, at_least(1)] = 1  # responses a rewrite
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    num_samples: Annotated[int, at_least(0)] = 3  # before/after samples kept in the report
    # "trained>static", "trained>static+0.05": pairs of arms whose paired 95% interval has to lie
    # above the margin. The report says whether it does; the command's exit status, too.
    require: tuple[str, ...] = ()
    threads: Threads = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.tuned is not None:
            check_local("target", self.target, "an adapter of the target (tuned) is measured")
        if isinstance(self.static, str):
            require("static", self.static, bool(self.static.strip()), "an instruction or a search")
        if self.policy_text is not None:
            require("policy_text", self.policy_text, bool(self.policy_text.strip()), "a text")
        for text in self.require:
            read_requirement(text)
        if self.judge is not None:
            pairs = self.num_rewrites * self.num_responses
            require(
                "judge.num_pairs",
                self.judge.num_pairs,
                self.judge.num_pairs <= pairs,
                f"at most {pairs}, the responses an arm gives to a prompt",
            )
