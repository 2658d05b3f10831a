"""Evaluation on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.config.fields import check_prompter, check_target, checked, require
from alignpro.config.prompting import RESPONSE, REWRITE, Prompting, check_sampling
from alignpro.types import SamplingParams


@dataclass(frozen=True)
@checked
class StaticSearch:
    """Search for the best fixed instruction on training prompts, by successive halving."""

    data: str | None = None  # prompts that the search may see; None: the evaluation's own data
    split: str | None = "train"  # of them; a prompt that is held out as well is refused
    instructions: str | None = "instructions"  # candidates: the "instruction" column of this source
    candidates: tuple[str, ...] = ()  # more of them, your own
    num_written: int = 32  # candidates that each prompter writes for training prompts; 0: none
    budget: int = 2048  # responses of the whole search

    def __post_init__(self) -> None:
        require("num_written", self.num_written, self.num_written >= 0, "0 or more")
        require("budget", self.budget, self.budget >= 1, "at least 1")
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
class OptimumConfig:
    """The optimum of the objective by resampling what the untuned prompter writes."""

    num_candidates: int = 16  # rewrites a prompt that the optimum is resampled from
    # Responses a candidate: their mean reward is its weight's exponent. Measured on SmolLM2: with
    # one, the arm keeps the untuned prompter's reward; with four, a third of the spread between
    # the candidates' means is R's own.
    num_responses: int = 4

    def __post_init__(self) -> None:
        require("num_candidates", self.num_candidates, self.num_candidates >= 2, "at least 2")
        require("num_responses", self.num_responses, self.num_responses >= 1, "at least 1")


@dataclass(frozen=True)
@checked
class JudgeConfig:
    """Who says which of two responses is better, and how it is asked."""

    model: str = ""  # a local model's path or name, or the endpoint's name for its model
    base_url: str | None = None  # an OpenAI-compatible endpoint, "https://.../v1"; None: local
    # The environment variable that holds the key, which is never stored. None: there is no key.
    api_key_env: str | None = "OPENAI_API_KEY"
    num_prompts: int | None = None  # the first so many; None: all
    num_pairs: int = 1  # pairs of responses a prompt
    cache: str | None = None  # JSONL of verdicts; None: beside the output file
    max_failed: float = 0.02  # share of questions that may stay without a verdict
    # Of an endpoint.
    concurrency: int = 8  # questions under way at once
    timeout_seconds: float = 60.0  # for one attempt
    max_retries: int = 4  # after 429, 5xx, a timeout or a broken connection
    temperature: float | None = 0.0  # None: leave it to the endpoint
    max_tokens: int | None = 16  # of the reply; None: leave it to the endpoint

    def __post_init__(self) -> None:
        require("model", self.model, bool(self.model.strip()), "the judge's path or name")
        if self.base_url is not None:
            url = self.base_url.startswith(("http://", "https://"))
            require("base_url", self.base_url, url, "an http:// or https:// address")
        if self.num_prompts is not None:
            require("num_prompts", self.num_prompts, self.num_prompts >= 2, "at least 2")
        for name in ("num_pairs", "concurrency"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("max_failed", self.max_failed, 0 <= self.max_failed < 1, "at least 0 and below 1")
        require("timeout_seconds", self.timeout_seconds, self.timeout_seconds > 0, "above 0")
        require("max_retries", self.max_retries, self.max_retries >= 0, "0 or more")
        if self.temperature is not None:
            require("temperature", self.temperature, self.temperature >= 0, "0 or more")
        if self.max_tokens is not None:
            require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")


@dataclass(frozen=True)
@checked
class EvalConfig:
    """The arms of an evaluation on held-out prompts; each group that is null leaves its arm out."""

    model: str = "smollm2"
    # On a CUDA device, in a build that has it: bfloat16 or float32. On the CPU: float32.
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    target: str | None = None
    # float32, or int8 on the CPU; bfloat16 or float32 on a CUDA device.
    target_compute: Literal["float32", "int8", "bfloat16"] = "float32"
    target_device: Literal["cpu", "cuda"] = "cpu"  # cuda: a build with CUDA, on a GPU
    target_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    untuned: str | None = None  # PEFT folder; None: the base model as prompter
    trained: str | None = None  # PEFT folder; None: no trained arm
    tuned: str | None = None  # PEFT folder of the target, tuned by the same reward: the oracle
    # One instruction for every prompt: the text itself, or how to search for it; {} takes the
    # defaults, here and in the other groups.
    static: str | StaticSearch | None = None
    optimum: OptimumConfig | None = None
    kl_coef: float = 0.05  # of the optimum; what the prompter was trained with
    judge: JudgeConfig | None = None
    data: str = "everyday"
    split: str | None = "heldout"
    reward: str = "vader+0.2*topic"
    seed: int = 0
    num_prompts: int | None = None  # the first so many rows; None: all
    num_rewrites: int = 4  # rewrites a prompt; an arm without any gets as many responses
    num_responses: int = 1  # responses a rewrite
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    num_samples: int = 3  # before/after samples kept in the report
    threads: int | None = None

    def __post_init__(self) -> None:
        check_prompter(self)
        check_target(self)
        for name in ("num_rewrites", "num_responses"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.num_prompts is not None:
            require("num_prompts", self.num_prompts, self.num_prompts >= 2, "at least 2")
        require("seed", self.seed, 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        require("num_samples", self.num_samples, self.num_samples >= 0, "0 or more")
        require("kl_coef", self.kl_coef, self.kl_coef > 0, "above 0")
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        if isinstance(self.static, str):
            require("static", self.static, bool(self.static.strip()), "an instruction or a search")
        if self.judge is not None:
            pairs = self.num_rewrites * self.num_responses
            require(
                "judge.num_pairs",
                self.judge.num_pairs,
                self.judge.num_pairs <= pairs,
                f"at most {pairs}, the responses an arm gives to a prompt",
            )
