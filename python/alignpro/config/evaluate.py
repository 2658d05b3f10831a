"""Evaluation on held-out prompts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from alignpro.config.data import HELD_OUT, DataConfig, InstructionsConfig
from alignpro.config.endpoint import Budget, ClientConfig, check_priced, check_url
from alignpro.config.fields import (
    Place,
    Range,
    RewardName,
    Seed,
    Threads,
    above,
    at_least,
    checked,
    only_default,
    require,
)
from alignpro.config.keys import ReadsOldKeys, did_you_mean
from alignpro.config.model import PROMPTER, ModelConfig, check_local, target_of
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
    "soft": "soft prompt",
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
            raise ValueError(
                f"require: {text}: expected one of the arms {', '.join(arms)}, got {name!r}"
                f"{did_you_mean(name, arms)}"
            )
    if left == right:
        raise ValueError(f"require: {text}: expected two arms, got one twice")
    return Requirement(left, right, float((sign or "") + (margin or "0")))


@dataclass(frozen=True)
@checked
class StaticSearch(metaclass=ReadsOldKeys):
    """Search for the best fixed instruction on training prompts, by successive halving."""

    data: DataConfig = field(default_factory=DataConfig)
    """Prompts that the search may see; one that is held out as well is refused."""
    instructions: InstructionsConfig | None = field(default_factory=InstructionsConfig)
    """Where candidates come from; null takes none of a source."""
    candidates: tuple[str, ...] = ()
    """More candidates, your own."""
    num_written: Annotated[int, at_least(0)] = 32
    """How many candidates each of the writers writes for training prompts."""
    writers: tuple[Literal["untuned", "trained"], ...] = ("untuned", "trained")
    """The prompters that write candidates.

    What the trained prompter writes comes from the training: with it, the search stands on what the
    training found. A static arm that owes nothing to the training has no "trained" here.
    """
    joined: Annotated[int, at_least(0)] = 0
    """How many of the best candidates are joined two by two; 0 joins none.

    In both orders ("A B" and "B A"); the second half of the budget goes to a search among them and
    these.
    """
    budget: Annotated[int, at_least(1)] = 2048
    """Responses of the whole search."""
    budget_tokens: Annotated[int, at_least(1)] | Literal["auto"] | None = None
    """Tokens of the target in the whole search, instead of responses; auto is as many as the
    training used.

    By the metrics.jsonl of the run that `trained` lies in.
    """

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

    column: str = "kind"
    """The column of the data that holds each row's label."""
    instructions: dict[str, str] | None = None
    """The instruction of each label, an empty one leaving the prompt as it is; null says that the
    column holds the instructions themselves."""


@dataclass(frozen=True)
@checked
class OptimumConfig:
    """The optimum of the objective by resampling what the untuned prompter writes."""

    num_candidates: Annotated[int, at_least(2)] = 16
    """Rewrites a prompt that the optimum is resampled from."""
    num_responses: Annotated[int, at_least(1)] = 4
    """Responses a candidate, whose mean reward decides its weight.

    Measured on SmolLM2: with one, the arm keeps the untuned prompter's reward; with four, a third
    of the spread between the candidates' means is their own.
    """


@dataclass(frozen=True)
@checked
class JudgeConfig:
    """Who says which of two responses is better, and how it is asked."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The judge: a local model, or the endpoint's name for its model."""
    base_url: str | None = None
    """The judge's OpenAI-compatible endpoint, such as "https://.../v1"; null is a local model."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key, which is never stored; null is for an endpoint
    without keys."""
    num_prompts: Annotated[int, at_least(2)] | None = None
    """How many of the prompts are judged, the first ones; null is all."""
    num_pairs: Annotated[int, at_least(1)] = 1
    """Pairs of responses that are compared for each prompt."""
    cache: Place | None = None
    """The JSONL file of verdicts; null is a file beside the output."""
    max_failed: Annotated[float, Range(lambda v: 0 <= v < 1, "at least 0 and below 1")] = 0.02
    """The share of questions that may stay without a verdict."""
    concurrency: Annotated[int, at_least(1)] = 8
    """How many questions an endpoint is asked at once."""
    timeout_seconds: Annotated[float, above(0)] = 60.0
    """Seconds for one attempt to ask an endpoint."""
    max_retries: Annotated[int, at_least(0)] = 4
    """How often a failed question is repeated.

    After 429, 5xx, a timeout, a broken connection or a reply that is none.
    """
    budget: Budget = field(default_factory=Budget)
    """What the judge's endpoint may be asked for before the judge fails."""
    input_price: Annotated[float, at_least(0)] | None = None
    """The price of a million tokens that the judge reads; null leaves costs out."""
    output_price: Annotated[float, at_least(0)] | None = None
    """The price of a million tokens that the judge writes; null leaves costs out."""
    temperature: Annotated[float, at_least(0)] | None = 0.0
    """The sampling temperature of the judge; null leaves it to the endpoint."""
    max_tokens: Annotated[int, at_least(1)] | None = 16
    """The most tokens of a reply; null leaves it to the endpoint."""

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
        check_priced(self.budget, self.input_price, self.output_price)

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
                input_price=self.input_price,
                output_price=self.output_price,
                body={"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": None},
            ),
        )


@dataclass(frozen=True)
@checked
class SimplexConfig:
    """Counts for the theory of jailbreaks (`alignpro.theory.jailbreak`); nothing measures them."""

    explanations: Annotated[int, at_least(2)] = 100
    """Answers that there are to a prompt."""
    harmful: Annotated[int, at_least(1)] = 5
    """How many of them are harmful."""
    epsilon: Annotated[float, at_least(0)] = 0.1
    """How far an adversary moves the distribution of answers, as the sum of the changes."""
    gamma: Annotated[float, at_least(0)] = 1.0
    """How much more often than a uniform one the model's distribution is a safe one."""

    def __post_init__(self) -> None:
        expected = f"below explanations ({self.explanations})"
        require("harmful", self.harmful, self.harmful < self.explanations, expected)


@dataclass(frozen=True)
@checked
class SafetyConfig:
    """How often answers to marked prompts are harmful, and what the other prompts pay for it."""

    where: str = "harmful"
    """The column that marks the prompts, by true and false."""
    harm: RewardName = "forbidden"
    """A reward that scores how harmful a response is."""
    threshold: float = 0.5
    """The score from which on a response counts as harmful."""
    zone: Annotated[float, Range(lambda v: 0 < v <= 1, "above 0 and at most 1")] = 0.1
    """The share of harmful responses from which on a prompt counts as one that is answered with
    harm."""
    simplex: SimplexConfig | None = None
    """What the theory says beside it ({} takes the defaults); null leaves it out."""


@dataclass(frozen=True)
@checked
class EvalConfig(StageConfig):
    """The arms of an evaluation on held-out prompts; each group that is null leaves its arm out."""

    prompter: ModelConfig = PROMPTER
    """The model that rewrites; its adapter is the untuned arm's, none being the base model.

    Where adapters of the target are compared and nothing names a prompter, none takes part.
    """
    target: ModelConfig | None = None  # frozen; None: the prompter's base weights
    trained: Place | None = None
    """The PEFT folder of the trained prompter; null leaves the trained arm out."""
    soft: Place | None = None
    """The PEFT folder of a soft prompt that the frozen target reads every prompt with; null leaves
    this arm out.

    `alignpro train policy=target tuner=soft_prompt` trains one. Every fixed instruction of its
    length is among what it may become.
    """
    tuned: Place | None = None
    """The PEFT folder of a target that was tuned by the same reward; null leaves this arm out."""
    static: str | StaticSearch | None = None
    """One instruction for every prompt: its text, or how to search for it ({} takes the defaults);
    null leaves this arm out."""
    policy_text: str | None = None
    """A whole policy as one conditional text ("If it is a question, ..."), put behind every prompt;
    null leaves this arm out."""
    labelled: Labelled | None = None
    """An instruction for each row by its label; null leaves this arm out."""
    optimum: OptimumConfig | None = None
    """The optimum of the objective, by resampling; null leaves this arm out."""
    kl_coef: Annotated[float, above(0)] = 0.05
    """The weight of the KL penalty in the optimum: what the prompter was trained with."""
    judge: JudgeConfig | None = None
    """A judge that compares the trained prompter's answers with the others'; null asks none."""
    data: DataConfig = HELD_OUT
    """The prompts."""
    reward: RewardName = "vader+0.2*topic"
    seed: Seed = 0
    num_prompts: Annotated[int, at_least(2)] | None = None
    """How many of the rows are used, the first ones; null is all."""
    num_rewrites: Annotated[int, at_least(1)] = 4
    """Rewrites a prompt; an arm without rewrites gets as many responses."""
    num_responses: Annotated[int, at_least(1)] = 1
    """Responses to each rewrite."""
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    num_samples: Annotated[int, at_least(0)] = 3
    """How many samples of before and after the report keeps."""
    safety: SafetyConfig | None = None
    """Harm on marked prompts ({} takes the defaults); null leaves it out."""
    require: tuple[str, ...] = ()
    """Differences between arms that have to be shown, such as "trained>static" or
    "trained>static+0.05".

    The whole paired 95% interval has to lie above the margin. The report says whether it does, and
    the command's exit status, too.
    """
    threads: Threads = None

    @property
    def prompters(self) -> dict[str, str | None]:
        """The arms that are prompters, and their adapters.

        What adapters of the target bring is told by the raw prompt: base weights as a prompter
        would be half of the work, and say nothing of it, unless something asks for them.
        """
        target = target_of(self.prompter, self.target)
        search = self.static if isinstance(self.static, StaticSearch) else None
        asked_for = (
            self.trained is not None,
            self.prompter.adapter is not None,
            self.prompter.model not in (PROMPTER.model, target.model),
            self.optimum is not None,
            search is not None and search.num_written > 0 and "untuned" in search.writers,
            any("untuned" in read_requirement(text)[:2] for text in self.require),
        )
        of_target = any(adapter is not None for adapter in (target.adapter, self.tuned, self.soft))
        arms = {"untuned": self.prompter.adapter} if any(asked_for) or not of_target else {}
        return arms if self.trained is None else {**arms, "trained": self.trained}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("soft", "tuned"):
            if self.target is not None and getattr(self, name) is not None:
                check_local("target", self.target, f"an adapter of the target ({name}) is measured")
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
