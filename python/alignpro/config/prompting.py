"""How prompter and target are put together, sampled and adapted: what every stage shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, overload

from alignpro.config.data import TRAINING, DataConfig, OnTooLong
from alignpro.config.fields import (
    Bytes,
    Date,
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
from alignpro.config.keys import ReadsOldKeys
from alignpro.config.model import PROMPTER, PROMPTER_HERE, ModelConfig, check_local
from alignpro.types import Conversation, Prompt, SamplingParams, transcript

# An instruction is a short sentence. Measured on 52 styles of instruction under the sentiment
# reward, the first 25 words of a response tell the styles apart as well as 50 do (the deviation
# between styles is 0.36 of that within one), and cost half as much.
REWRITE = SamplingParams(max_new_tokens=12)
RESPONSE = SamplingParams(max_new_tokens=32, temperature=0.7)


@dataclass(frozen=True)
@checked
class Prompting:
    """How prompter and target are put together."""

    mode: Literal["append", "rewrite"] = "append"
    """What the target reads: the prompt with what the prompter wrote behind it (append), or what
    the prompter wrote instead of the prompt (rewrite).

    Of a conversation, this is its last user turn; the rest reaches the target as it is.
    """
    template: str = (
        "Write one short instruction that says how to answer this request.\n\nRequest: {prompt}"
    )
    """The user turn that the prompter reads, in which {prompt} stands for the last user turn."""
    separator: str = "\n\n"
    """What stands between the prompt and the instruction, with mode append."""
    target_template: str = "{prompt}"
    """The user turn that the target reads; {prompt} stands for the prompt with its rewrite.

    Such as a schema's, of `alignpro extract --show-template`, around texts to extract from. The
    reward sees the prompt alone.
    """
    history: Literal["none", "turns", "all"] = "all"
    """What the prompter is shown of a conversation before its last user turn: nothing, the turns of
    user and assistant, or the system message as well."""
    history_template: str = "Conversation so far:\n\n{history}\n\n"
    """What stands before the template where there is a history to show, for which {history} stands.
    """
    history_cut: Literal["oldest", "nothing"] = "oldest"
    """What is left out of the history that the prompter's context cannot hold: the oldest messages,
    or nothing, which is an error instead.

    Whole messages, the oldest first and the system message last.
    """

    def __post_init__(self) -> None:
        for name, place in (
            ("template", "{prompt}"),
            ("target_template", "{prompt}"),
            ("history_template", "{history}"),
        ):
            text: str = getattr(self, name)
            if text.count(place) != 1:
                raise ValueError(
                    f'{name}: expected "{place}" exactly once, got it '
                    f"{text.count(place)} times in {text!r}"
                )

    def prompter_turns(self, prompt: Prompt) -> Sequence[str]:
        """The user turn the prompter reads, whole, and then with ever more of the history cut; each
        is made when it is asked for. Braces inside the prompt stay what they are."""
        conversation = Conversation.of(prompt)
        turn = _filled(self.template, "{prompt}", conversation.last_turn)
        shown = [
            (role, content)
            for role, content in conversation.history
            if self.history == "all" or (self.history == "turns" and role in ("user", "assistant"))
        ]
        order = sorted(
            range(len(shown)), key=lambda index: shown[index][0] not in ("user", "assistant")
        )

        def cut(count: int) -> str:
            left = [shown[index] for index in sorted(order[count:])]
            if not left:
                return turn
            return _filled(self.history_template, "{history}", transcript(left)) + turn

        return _Turns(cut, 1 if self.history_cut == "nothing" else 1 + len(shown))

    def target_prompt(self, prompt: Prompt, rewrite: str) -> Prompt:
        """What the target reads: only the last turn is another. An empty rewrite leaves the prompt
        as it is, in its template."""
        if not rewrite and self.target_template == "{prompt}":
            return prompt
        conversation = Conversation.of(prompt)
        turn = self.rewritten(conversation.last_turn, rewrite)
        return conversation.with_last_turn(_filled(self.target_template, "{prompt}", turn)).short

    def rewritten(self, turn: str, rewrite: str) -> str:
        """The last turn with its rewrite, before it is put into the target's template."""
        return self.before_rewrite(turn) + rewrite if rewrite else turn

    def before_rewrite(self, turn: str) -> str:
        """What stands before the rewrite in the turn that the target reads."""
        return turn + self.separator if self.mode == "append" else ""


class _Turns(Sequence[str]):
    """``make(index)`` of each index below ``count``: all texts of a history of N turns would be of
    N^2 turns."""

    def __init__(self, make: Callable[[int], str], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(self._count)[index]
        return self._make(places) if isinstance(places, int) else [self._make(i) for i in places]


def _filled(template: str, place: str, text: str) -> str:
    before, after = template.split(place)
    return before + text + after


@dataclass(frozen=True)
@checked
class LoraConfig:
    """The trained part of the prompter (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, at_least(1)] = 16
    """The rank of the LoRA matrices."""
    alpha: Annotated[float, above(0)] = 32.0
    """The scale of the update, which is alpha / rank * B A."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The linear layers that are adapted: "all-linear", or endings of module paths such as [q_proj,
    v_proj]."""

    def __post_init__(self) -> None:
        require(
            "target_modules", self.target_modules, bool(self.target_modules), "at least one name"
        )


_TEXT = "text:"


def _is_init(value: str) -> bool:
    text = value.startswith(_TEXT) and bool(value.removeprefix(_TEXT).strip())
    return text or value in ("vocabulary", "random")


@dataclass(frozen=True)
@checked
class SoftPromptConfig:
    """Rows among the embedded tokens, which are trained while the model stays as it is (prompt
    tuning, arXiv 2104.08691)."""

    num_tokens: Annotated[int, at_least(1)] = 16
    """The number of rows; each takes the place of a token in the context."""
    init: Annotated[str, Range(_is_init, '"vocabulary", "random" or "text: ..."')] = "vocabulary"
    """What the rows start as: the embeddings of tokens drawn at random, random numbers of the
    embeddings' size, or the embeddings of a text ("text: Answer in a warm tone."), repeated or cut.
    """
    place: Literal["start", "instruction"] = "start"
    """Where the rows stand: before everything that the model reads, or at the end of the last user
    turn, behind prompting.separator, where an appended instruction stands.

    start is what PEFT knows.
    """

    @property
    def text(self) -> str | None:
        """The text that the rows start as; None for none."""
        return self.init.removeprefix(_TEXT).strip() if self.init.startswith(_TEXT) else None


@dataclass(frozen=True)
@checked
class FitConfig:
    """How a stage that trains does so."""

    steps: Annotated[int, at_least(0)] = 20
    """Steps of training."""
    memory_limit: Bytes = 2**29
    """The most memory that one forward and backward pass may hold, such as "800MiB".

    A step is scored in micro-batches, which never change its gradient: each as large as fits.
    """
    activations: Literal["auto", "keep", "recompute"] = "auto"
    """Whether activations are kept for the backward pass or computed again.

    auto: keep them, unless recomputing is cheaper than smaller micro-batches, or the only way.
    """
    micro_batch_size: Annotated[int, at_least(1)] | None = None
    """The most rewrites, or pairs, in a micro-batch; null sets no limit."""

    # The optimizer: AdamW.
    learning_rate: Annotated[float, above(0)] = 3e-4
    """The learning rate of AdamW."""
    warmup_steps: Annotated[int, at_least(0)] = 2
    """Steps in which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Whether the learning rate stays constant or falls linearly to 0 at the last step."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """The weight decay of AdamW."""
    max_grad_norm: Annotated[float, above(0)] = 1.0
    """The norm to which gradients are clipped."""
    tuner: Literal["lora", "soft_prompt"] = "lora"
    """What is trained: LoRA matrices in the layers, or the rows of a soft prompt among the tokens.

    Rows take a larger learning_rate, of 1e-2 to 3e-2, and no weight decay.
    """
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that is trained, where there is none to start from."""
    soft_prompt: SoftPromptConfig = field(default_factory=SoftPromptConfig)
    """The soft prompt that is trained with tuner soft_prompt, where there is none to start from."""


def check_tuner(config: FitConfig) -> None:
    """Refuse what the tuner does not read."""
    other, where = (
        ("soft_prompt", "with tuner soft_prompt")
        if config.tuner == "lora"
        else ("lora", "with tuner lora")
    )
    group = getattr(config, other)
    for f in fields(group):
        only_default(group, f.name, where, f"{other}.")
    if config.tuner == "soft_prompt":
        only_default(config, "weight_decay", "with tuner lora: it would draw rows to 0")


@dataclass(frozen=True)
@checked
class PairsFitConfig(FitConfig):
    """What every stage says that fits a model to pairs of its own."""

    on_too_long: OnTooLong = "error"
    """What becomes of a pair that the model's context does not hold: an error before the first
    step, its row left out, or the prompt cut.

    What is to be written is never cut. See `StageConfig.on_too_long`.
    """
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Pairs in a step."""
    checkpoint_every: Annotated[int, at_least(1)] = 10
    """Steps from one checkpoint to the next; one is always written at the end and at Ctrl-C."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's, which the run
    records."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    @property
    def rewrite(self) -> SamplingParams:
        """How its prompter is sampled, as `StageConfig` has it."""
        return REWRITE


@dataclass(frozen=True)
@checked
class StageConfig(metaclass=ReadsOldKeys):
    """What every stage of two models says: which they are, how they are put together and drawn."""

    prompter: ModelConfig = PROMPTER
    """The model that rewrites prompts; its adapter is the untuned prompter's."""
    target: ModelConfig | None = None
    """The frozen model that answers; null is the base weights of the prompter."""
    data: DataConfig = TRAINING
    """The prompts."""
    on_too_long: OnTooLong = "error"
    """What becomes of a prompt that a model cannot read with what is written behind it: an error
    before the first step, its row left out, or the prompt cut.

    cut: the oldest turns of its conversation are left out, then the middle of its last turn, which
    prompter, target and reward then read alike.
    """
    reward: RewardName = "vader+0.2*topic"
    """The reward: a sum of terms such as "vader+0.2*topic" or "module:function".

    Names are those of `alignpro.build_reward`.
    """
    seed: Seed = 0
    """The random seed, from which everything random follows."""
    rewrite: SamplingParams = REWRITE
    """How the prompter is sampled."""
    response: SamplingParams = RESPONSE
    """How the target is sampled."""
    prompting: Prompting = field(default_factory=Prompting)
    """How prompter and target are put together."""
    date: Date = None
    """The date that chat templates are told, such as 2026-11-28; null is today's, which the run
    records."""
    threads: Threads = None
    """The number of threads; null is the CPU quota."""

    def __post_init__(self) -> None:
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        check_local("prompter", self.prompter, PROMPTER_HERE)
        require("data.path", self.data.path, self.data.path is not None, "a source")


def check_sampling(name: str, params: SamplingParams) -> None:
    """Refuse what a stage sets itself; what the values may be is the engine's to say."""
    require(f"{name}.n", params.n, params.n == 1, "1: num_rewrites and num_responses say how many")
    require(f"{name}.seed", params.seed, params.seed is None, "unset: it is derived from seed")
    deadline = params.deadline_seconds
    expected = "unset: a deadline would make results depend on the clock"
    require(f"{name}.deadline_seconds", deadline, deadline is None, expected)


def check_untruncated(name: str, params: SamplingParams, reason: str) -> None:
    """Refuse what draws from another distribution than the log-probabilities are of."""
    require(f"{name}.temperature", params.temperature, params.temperature > 0, f"above 0: {reason}")
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "ignore_eos": False}
    off |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    for key, value in off.items():
        given = getattr(params, key)
        require(f"{name}.{key}", given, given == value, f"{value}: {reason}")
