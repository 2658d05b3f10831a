"""How prompter and target are put together, sampled and adapted: what every stage shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from alignpro.config.fields import checked, require
from alignpro.types import SamplingParams

# An instruction is a short sentence. Measured on 52 styles of instruction under the sentiment
# reward, the first 25 words of a response tell the styles apart as well as 50 do (the deviation
# between styles is 0.36 of that within one), and cost half as much.
REWRITE = SamplingParams(max_new_tokens=12)
RESPONSE = SamplingParams(max_new_tokens=32, temperature=0.7)


@dataclass(frozen=True)
@checked
class Prompting:
    """How prompter and target are put together."""

    # append: the target reads the prompt, the separator, then what the prompter wrote.
    # rewrite: the target reads what the prompter wrote instead of the prompt.
    mode: Literal["append", "rewrite"] = "append"
    # The user turn that the prompter reads; {prompt} stands for the user's prompt.
    template: str = (
        "Write one short instruction that says how to answer this request.\n\nRequest: {prompt}"
    )
    separator: str = "\n\n"  # append mode: between the prompt and the instruction

    def __post_init__(self) -> None:
        if self.template.count("{prompt}") != 1:
            raise ValueError(
                'template: expected "{prompt}" exactly once, got it '
                f"{self.template.count('{prompt}')} times in {self.template!r}"
            )

    def prompter_turn(self, prompt: str) -> str:
        """The user turn the prompter reads. Braces inside ``prompt`` stay what they are."""
        before, after = self.template.split("{prompt}")
        return before + prompt + after

    def target_turn(self, prompt: str, rewrite: str) -> str:
        """The user turn the target reads. An empty rewrite leaves the prompt as it is."""
        if not rewrite:
            return prompt
        return rewrite if self.mode == "rewrite" else prompt + self.separator + rewrite


@dataclass(frozen=True)
@checked
class LoraConfig:
    """The trained part of the prompter (LoRA, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0  # the update is alpha / rank * B A
    rslora: bool = False  # alpha / sqrt(rank) instead (arXiv 2312.03732)
    # "all-linear", or endings of module paths: ["q_proj", "v_proj"]
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        require("rank", self.rank, self.rank >= 1, "at least 1")
        require("alpha", self.alpha, self.alpha > 0, "above 0")
        require(
            "target_modules", self.target_modules, bool(self.target_modules), "at least one name"
        )


class SamplingConfig(Protocol):
    """What every stage that samples says: how prompter and target are put together and drawn."""

    @property
    def prompting(self) -> Prompting: ...

    @property
    def rewrite(self) -> SamplingParams: ...

    @property
    def response(self) -> SamplingParams: ...


def check_sampling(name: str, params: SamplingParams) -> None:
    """Refuse what a stage sets itself, and values without a meaning."""
    require(f"{name}.temperature", params.temperature, params.temperature >= 0, "0 or more")
    require(f"{name}.top_k", params.top_k, params.top_k >= 0, "0 (off) or more")
    require(f"{name}.top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1")
    require(f"{name}.min_p", params.min_p, 0 <= params.min_p < 1, "at least 0 and below 1")
    require(
        f"{name}.max_new_tokens", params.max_new_tokens, params.max_new_tokens >= 1, "1 or more"
    )
    require(
        f"{name}.min_new_tokens",
        params.min_new_tokens,
        0 <= params.min_new_tokens <= params.max_new_tokens,
        f"between 0 and max_new_tokens ({params.max_new_tokens})",
    )
    require(f"{name}.n", params.n, params.n == 1, "1: num_rewrites and num_responses say how many")
    require(f"{name}.seed", params.seed, params.seed is None, "unset: it is derived from seed")
    require(
        f"{name}.deadline_seconds",
        params.deadline_seconds,
        params.deadline_seconds is None,
        "unset: a deadline would make results depend on the clock",
    )


def check_on_policy(name: str, params: SamplingParams) -> None:
    """The gradient is that of the untruncated policy, so that is what must be sampled."""
    require(
        f"{name}.temperature",
        params.temperature,
        params.temperature > 0,
        "above 0: a greedy policy explores nothing",
    )
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "ignore_eos": False}
    for field, value in off.items():
        require(
            f"{name}.{field}",
            getattr(params, field),
            getattr(params, field) == value,
            f"{value} in training: a truncated draw biases the policy gradient",
        )
