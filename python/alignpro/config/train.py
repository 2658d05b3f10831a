"""Reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from alignpro.config.closed_form import ClosedFormConfig
from alignpro.config.fields import (
    Bytes,
    check_micro_batches,
    check_optimizer,
    check_prompter,
    check_target,
    checked,
    default_of,
    require,
)
from alignpro.config.ppo import PpoConfig
from alignpro.config.prompting import (
    RESPONSE,
    REWRITE,
    LoraConfig,
    Prompting,
    check_on_policy,
    check_sampling,
)
from alignpro.types import SamplingParams


@dataclass(frozen=True)
@checked
class TrainConfig:
    """Reinforcement learning of the prompter with a KL leash."""

    # What is trained, and on what.
    model: str = "smollm2"  # path or name of the prompter's base weights
    # On a CUDA device, in a build that has it: bfloat16 or float32. On the CPU: float32.
    prompter_device: Literal["cpu", "cuda"] = "cpu"
    prompter_compute: Literal["float32", "bfloat16"] = "float32"
    prompter_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    adapter: str | None = None  # PEFT folder to start from; it is the reference, too
    target: str | None = None  # path or name of the frozen target; None: the prompter's base
    # float32, or int8 on the CPU (faster, less exact); bfloat16 or float32 on a CUDA device.
    target_compute: Literal["float32", "int8", "bfloat16"] = "float32"
    target_device: Literal["cpu", "cuda"] = "cpu"
    target_mode: Literal["strict", "fast"] = "strict"  # fast, on CUDA: products by cuBLASLt
    # target: no prompter; the target itself is tuned on the raw prompts, with a LoRA and the same
    # objective (the paper's oracle, for comparison). num_rewrites then counts its responses.
    policy: Literal["prompter", "target"] = "prompter"
    data: str = "everyday"  # prompts: packaged name, file, or hub name
    split: str | None = "train"  # rows whose "split" column says so; None: all rows
    reward: str = "vader+0.2*topic"
    run_dir: str = "alignpro-run"
    seed: int = 0

    # One step.
    steps: int = 20
    prompts_per_step: int = 16
    num_rewrites: int = 4  # N, rewrites a prompt: the group that the baseline is taken over
    # M, responses a rewrite. auto: N and M follow from how much of the reward's variance is the
    # target's own noise, with N * M = response_budget.
    num_responses: int | Literal["auto"] = 1
    response_budget: int | None = None  # responses a prompt and step, with auto
    # The policy is the untruncated distribution at this temperature.
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)

    # The objective: mean reward - kl_coef * KL(prompter || reference), KL in nats per rewrite.
    kl_coef: float = 0.05
    # Nats per rewrite: kl_coef is only where to start, and is steered (objective.leash) to this.
    kl_target: float | None = None
    kl_gain: float = 0.1  # with kl_target: a step moves kl_coef by exp(0.2 * this) at most

    # The baseline: siblings (rloo), siblings and division by their spread (grpo, which optimises
    # something else: objective.advantage), earlier steps (reinforce). ppo: several passes a batch.
    # closed_form: a fit to one set of samples of the reference; no rollouts while training.
    algorithm: Literal["rloo", "grpo", "reinforce", "ppo", "closed_form"] = "rloo"
    baseline_decay: float = 0.9  # reinforce: what a step's mean reward keeps, a step later
    ppo: PpoConfig = field(default_factory=PpoConfig)
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    # Prompts whose rewrites all earned the same teach nothing but the KL: keep that, or skip them
    # (not scored, not in the mean; a step of none else changes nothing).
    zero_signal: Literal["keep", "skip"] = "keep"
    strict_parity: bool = True  # stop unless sampled and scored log-probabilities are equal

    # A step is scored in micro-batches, which never change its gradient: each as large as fits.
    memory_limit: Bytes = 2**29  # what one forward and backward may hold; or text: "800MiB"
    # auto: keep activations for the backward, unless recomputing them is cheaper than smaller
    # micro-batches, or the only way.
    activations: Literal["auto", "keep", "recompute"] = "auto"
    micro_batch_size: int | None = None  # the most rewrites in a micro-batch; None: any number

    # The optimizer: AdamW.
    learning_rate: float = 3e-4
    warmup_steps: int = 2  # linear, from 0
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: down to 0 at the last step
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: LoraConfig = field(default_factory=LoraConfig)  # without an adapter to start from

    # Trackers beside metrics.jsonl (always) and TensorBoard (where it is installed).
    track: tuple[Literal["wandb", "trackio"], ...] = ()
    checkpoint_every: int = 10  # steps; one is always written at the end and at Ctrl-C
    threads: int | None = None  # None: the container's CPU quota

    def __post_init__(self) -> None:
        check_prompter(self)
        check_target(self)
        require("steps", self.steps, self.steps >= 0, "0 or more")
        require("prompts_per_step", self.prompts_per_step, self.prompts_per_step >= 1, "1 or more")
        require("kl_coef", self.kl_coef, self.kl_coef >= 0, "0 or more")
        self._check_algorithm()
        self._check_counts()
        self._check_leash()
        require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "1 or more")
        once = len(set(self.track)) == len(self.track)
        require("track", self.track, once, "every tracker once")
        check_optimizer(self)
        check_micro_batches(self)
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        check_on_policy("response" if self._tunes_target else "rewrite", self.sampled)
        if self._tunes_target:
            self._check_tuned_target()

    @property
    def sampled(self) -> SamplingParams:
        """How the policy is sampled: ``rewrite``, or ``response`` where it is the target."""
        return self.response if self._tunes_target else self.rewrite

    @property
    def _tunes_target(self) -> bool:
        return self.policy == "target"

    @property
    def _group_baseline(self) -> bool:
        """The baseline is taken over the rewrites of a prompt."""
        critic = self.algorithm == "ppo" and self.ppo.value_head
        return self.algorithm in ("rloo", "grpo", "ppo") and not critic

    def _check_algorithm(self) -> None:
        if self.algorithm != "ppo":
            for f in fields(self.ppo):
                _only_default(self.ppo, f.name, "with algorithm ppo", "ppo.")
        if self.algorithm != "reinforce":
            _only_default(self, "baseline_decay", "with algorithm reinforce")
        decay = self.baseline_decay
        require("baseline_decay", decay, 0 <= decay < 1, "at least 0 and below 1")
        batches, prompts = self.ppo.minibatches, self.prompts_per_step
        if self.algorithm == "ppo":
            expected = f"at most prompts_per_step ({prompts}): a minibatch has whole prompts"
            require("ppo.minibatches", batches, batches <= prompts, expected)
        if self.algorithm == "closed_form":
            require("kl_coef", self.kl_coef, self.kl_coef > 0, "above 0 with closed_form")
            for name in ("kl_target", "response_budget"):
                _only_default(self, name, "with an algorithm that samples while it trains")
            fixed = self.num_responses != "auto"
            require("num_responses", self.num_responses, fixed, "a number with closed_form")
        else:
            for f in fields(self.closed_form):
                _only_default(
                    self.closed_form, f.name, "with algorithm closed_form", "closed_form."
                )
        if not self._group_baseline:
            _only_default(
                self,
                "zero_signal",
                "with a baseline over the rewrites of a prompt (rloo, grpo, ppo without value "
                "head): with another one, equal rewards do teach something",
            )

    def _check_counts(self) -> None:
        rewrites, responses, budget = self.num_rewrites, self.num_responses, self.response_budget
        if responses == "auto":
            _only_default(self, "num_rewrites", "with a number of num_responses; auto chooses both")
            require(
                "response_budget",
                budget,
                budget is not None and any(budget % m == 0 for m in range(2, budget // 2 + 1)),
                "a product of two numbers above 1 (responses a prompt and step), with "
                "num_responses auto",
            )
            return
        _only_default(self, "response_budget", "with num_responses auto")
        require("num_responses", responses, responses >= 1, 'at least 1, or "auto"')
        if self._group_baseline or self.algorithm == "closed_form":
            expected = "at least 2: a rewrite is judged against the others of its prompt"
            require("num_rewrites", rewrites, rewrites >= 2, expected)
        require("num_rewrites", rewrites, rewrites >= 1, "at least 1")
        if self.algorithm == "reinforce":
            expected = "2 or more with prompts_per_step 1: the first step is its own baseline"
            require("num_rewrites", rewrites, rewrites * self.prompts_per_step >= 2, expected)

    def _check_leash(self) -> None:
        if self.kl_target is None:
            _only_default(self, "kl_gain", "with kl_target")
            return
        require("kl_target", self.kl_target, self.kl_target > 0, "above 0")
        require("kl_gain", self.kl_gain, self.kl_gain > 0, "above 0")
        require("kl_coef", self.kl_coef, self.kl_coef > 0, "above 0 with kl_target, to be steered")

    def _check_tuned_target(self) -> None:
        for name in ("num_responses", "prompter_device", "prompter_compute", "prompter_mode"):
            _only_default(self, name, "with policy prompter")
        compute = self.target_compute
        expected = "float32 or bfloat16 with policy target: int8 has no gradients"
        require("target_compute", compute, compute != "int8", expected)
        require(
            "algorithm",
            self.algorithm,
            self.algorithm != "closed_form",
            "another one with policy target: the closed form is the prompter's",
        )


def _only_default(
    config: TrainConfig | PpoConfig | ClosedFormConfig, name: str, where: str, path: str = ""
) -> None:
    """Refuse an option that would do nothing."""
    value = getattr(config, name)
    default = default_of(next(f for f in fields(config) if f.name == name))
    require(path + name, value, value == default, f"its default {default!r} (it goes {where})")
