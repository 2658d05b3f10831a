"""What prompting can reach: the headroom before training, the bound against a tuned target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.config.fields import check_prompter, check_target, checked, require
from alignpro.config.prompting import RESPONSE, REWRITE, Prompting, check_sampling
from alignpro.types import SamplingParams

KL_COEFS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
@checked
class HeadroomConfig:
    """Rewrites of the untuned prompter, their responses and rewards, and a grid of kl_coef."""

    model: str = "smollm2"  # path or name of the prompter's base weights
    # On a CUDA device, in a build that has it: bfloat16 or float32. On the CPU: float32.
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    adapter: str | None = None  # PEFT folder of the untuned prompter; None: the base model
    target: str | None = None  # path or name of the frozen target; None: the prompter's base
    # float32, or int8 on the CPU; bfloat16 or float32 on a CUDA device.
    target_compute: Literal["float32", "int8", "bfloat16"] = "float32"
    target_device: Literal["cpu", "cuda"] = "cpu"  # cuda: a build with CUDA, on a GPU
    target_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    data: str = "everyday"
    split: str | None = "train"
    reward: str = "vader+0.2*topic"
    seed: int = 0
    num_prompts: int | None = 48  # the first so many rows; None: all
    num_rewrites: int = 8  # N: the KL that the samples can show is at most log N
    num_responses: int = 4  # M; from 2 on, the estimates that are freed of noise
    rewrite: SamplingParams = REWRITE  # the untruncated distribution, as in training
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    kl_coefs: tuple[float, ...] = KL_COEFS
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_samples(self)
        require("kl_coefs", self.kl_coefs, bool(self.kl_coefs), "at least one number")
        for number, value in enumerate(self.kl_coefs):
            require(f"kl_coefs[{number}]", value, value > 0, "above 0")


@dataclass(frozen=True)
@checked
class BoundConfig:
    """The bound at one kl_coef, and the gap that is measured beside it."""

    model: str = "smollm2"  # path or name of the prompter's base weights
    # On a CUDA device, in a build that has it: bfloat16 or float32. On the CPU: float32.
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    adapter: str | None = None  # PEFT folder of the untuned prompter; None: the base model
    trained: str | None = None  # PEFT folder of a trained prompter; None: not measured
    target: str | None = None  # path or name of the frozen target; None: the prompter's base
    # float32, or int8 on the CPU; bfloat16 or float32 on a CUDA device.
    target_compute: Literal["float32", "int8", "bfloat16"] = "float32"
    target_device: Literal["cpu", "cuda"] = "cpu"  # cuda: a build with CUDA, on a GPU
    target_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    # PEFT folder of the tuned target; None: the optimum in closed form, from the target's samples.
    tuned: str | None = None
    data: str = "everyday"
    split: str | None = "heldout"
    reward: str = "vader+0.2*topic"
    reward_range: tuple[float, ...] | None = None  # [low, high]; None: what was observed
    seed: int = 0
    num_prompts: int | None = 32  # the first so many rows; None: all
    num_rewrites: int = 8  # N
    num_responses: int = 4  # M; the raw prompt gets N x M
    # Log-probabilities are those of the untruncated distribution, so that is what is sampled.
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    kl_coef: float = 0.05
    tuned_kl_coef: float | None = None  # of the closed-form tuned target; None: kl_coef
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_samples(self)
        _check_untruncated("response", self.response)
        require("kl_coef", self.kl_coef, self.kl_coef > 0, "above 0")
        coefficient = self.tuned_kl_coef
        require("tuned_kl_coef", coefficient, coefficient is None or coefficient > 0, "above 0")
        require(
            "tuned_kl_coef",
            coefficient,
            coefficient is None or self.tuned is None,
            "unset beside tuned: that target was tuned already",
        )
        span = self.reward_range
        require(
            "reward_range",
            span,
            span is None or (len(span) == 2 and span[0] < span[1]),
            "[low, high] with low < high",
        )


def _check_untruncated(name: str, params: SamplingParams) -> None:
    """Refuse what makes the distribution drawn from another one than its log-probabilities say."""
    require(f"{name}.temperature", params.temperature, params.temperature > 0, "above 0")
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "ignore_eos": False}
    for key, value in off.items():
        given = getattr(params, key)
        expected = f"{value}: the untruncated distribution is what is scored"
        require(f"{name}.{key}", given, given == value, expected)


def _check_samples(config: HeadroomConfig | BoundConfig) -> None:
    check_prompter(config)
    check_target(config)
    prompts = config.num_prompts
    require("num_prompts", prompts, prompts is None or prompts >= 2, "at least 2")
    require("num_rewrites", config.num_rewrites, config.num_rewrites >= 2, "at least 2")
    require("num_responses", config.num_responses, config.num_responses >= 1, "at least 1")
    require("seed", config.seed, 0 <= config.seed < 2**64, "between 0 and 2**64 - 1")
    check_sampling("rewrite", config.rewrite)
    check_sampling("response", config.response)
    _check_untruncated("rewrite", config.rewrite)
