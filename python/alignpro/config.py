"""Every option of every stage, as dataclasses with commented defaults. Standard library only.

A configuration is read from a mapping (`from_mapping`), from a YAML file (`load_yaml`, which needs
PyYAML) and adjusted by overrides ("train.learning_rate=1e-4"). Whatever the way in, an unknown key,
a value of the wrong type and a value out of range are a `ValueError` of one line naming the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from alignpro.types import SamplingParams

T = TypeVar("T")
Bytes = Annotated[int, "bytes"]  # read from text with a unit as well: "1.5GB", "800MiB"

# An instruction is a short sentence. Measured on 52 styles of instruction under the sentiment
# reward, the first 25 words of a response tell the styles apart as well as 50 do (the deviation
# between styles is 0.36 of that within one), and cost half as much.
REWRITE = SamplingParams(max_new_tokens=12)
RESPONSE = SamplingParams(max_new_tokens=32, temperature=0.7)


@dataclass(frozen=True)
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
class LoraConfig:
    """The trained part of the prompter (LoRA, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0  # the update is alpha / rank * B A
    rslora: bool = False  # alpha / sqrt(rank) instead (arXiv 2312.03732)
    # "all-linear", or endings of module paths: ["q_proj", "v_proj"]
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        _require("rank", self.rank, self.rank >= 1, "at least 1")
        _require("alpha", self.alpha, self.alpha > 0, "above 0")
        _require(
            "target_modules", self.target_modules, bool(self.target_modules), "at least one name"
        )


@dataclass(frozen=True)
class SftConfig:
    """The supervised warm start: fits (prompt, instruction) pairs."""

    model: str = "smollm2"  # path or name of the prompter's base weights
    data: str = "instructions"  # pairs: packaged name, file, or hub name
    run_dir: str = "alignpro-sft"
    seed: int = 0
    steps: int = 32
    batch_size: int = 16  # pairs a step
    learning_rate: float = 1e-3
    warmup_steps: int = 3  # linear, from 0
    lr_schedule: Literal["constant", "linear"] = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # As in `TrainConfig`.
    memory_limit: Bytes = 2**29
    activations: Literal["auto", "keep", "recompute"] = "auto"
    micro_batch_size: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompting: Prompting = field(default_factory=Prompting)
    threads: int | None = None  # None: the container's CPU quota

    def __post_init__(self) -> None:
        _require("steps", self.steps, self.steps >= 0, "0 or more")
        _require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _check_optimizer(self)
        _check_micro_batches(self)


@dataclass(frozen=True)
class TrainConfig:
    """Reinforcement learning of the prompter with a KL leash."""

    # What is trained, and on what.
    model: str = "smollm2"  # path or name of the prompter's base weights
    adapter: str | None = None  # PEFT folder to start from; it is the reference, too
    target: str | None = None  # path or name of the frozen target; None: the prompter's base
    target_compute: Literal["float32", "int8"] = "float32"  # int8 is faster, less exact
    data: str = "everyday"  # prompts: packaged name, file, or hub name
    split: str | None = "train"  # rows whose "split" column says so; None: all rows
    reward: str = "vader+0.2*topic"
    run_dir: str = "alignpro-run"
    seed: int = 0

    # One step.
    steps: int = 20
    prompts_per_step: int = 16
    num_rewrites: int = 4  # N, rewrites a prompt: the group that the baseline is taken over
    num_responses: int = 1  # M, responses a rewrite
    # The policy is the untruncated distribution at this temperature.
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)

    # The objective: mean reward - kl_coef * KL(prompter || reference), KL in nats per rewrite.
    kl_coef: float = 0.05
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

    checkpoint_every: int = 10  # steps; one is always written at the end and at Ctrl-C
    threads: int | None = None  # None: the container's CPU quota

    def __post_init__(self) -> None:
        _require("steps", self.steps, self.steps >= 0, "0 or more")
        _require("prompts_per_step", self.prompts_per_step, self.prompts_per_step >= 1, "1 or more")
        _require(
            "num_rewrites",
            self.num_rewrites,
            self.num_rewrites >= 2,
            "at least 2: the baseline is the mean of the other rewrites of the prompt",
        )
        _require("num_responses", self.num_responses, self.num_responses >= 1, "at least 1")
        _require("kl_coef", self.kl_coef, self.kl_coef >= 0, "0 or more")
        _require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "1 or more")
        _check_optimizer(self)
        _check_micro_batches(self)
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)
        _check_on_policy(self.rewrite)


@dataclass(frozen=True)
class EvalConfig:
    """Raw prompt, untuned prompter and trained prompter on held-out prompts."""

    model: str = "smollm2"
    target: str | None = None
    target_compute: Literal["float32", "int8"] = "float32"
    untuned: str | None = None  # PEFT folder; None: the base model as prompter
    trained: str | None = None  # PEFT folder; None: no trained arm
    data: str = "everyday"
    split: str | None = "heldout"
    reward: str = "vader+0.2*topic"
    seed: int = 0
    num_prompts: int | None = None  # the first so many rows; None: all
    num_rewrites: int = 4  # rewrites a prompt; the raw arm gets as many responses
    num_responses: int = 1  # responses a rewrite
    rewrite: SamplingParams = REWRITE
    response: SamplingParams = RESPONSE
    prompting: Prompting = field(default_factory=Prompting)
    num_samples: int = 3  # before/after samples kept in the report
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_rewrites", "num_responses"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.num_prompts is not None:
            _require("num_prompts", self.num_prompts, self.num_prompts >= 2, "at least 2")
        _require("num_samples", self.num_samples, self.num_samples >= 0, "0 or more")
        check_sampling("rewrite", self.rewrite)
        check_sampling("response", self.response)


@dataclass(frozen=True)
class QuickstartConfig:
    """Warm start, training and evaluation in one go.

    The fields here hold for every stage; ``sft``, ``train`` and ``evaluate`` hold the rest.
    """

    model: str = "smollm2"
    reward: str = "vader+0.2*topic"
    seed: int = 0
    run_dir: str = "alignpro-quickstart"  # a number is added while the directory exists
    threads: int | None = None
    prompting: Prompting = field(default_factory=Prompting)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        shared = {f.name for f in dataclasses.fields(self)} | {"adapter", "untuned", "trained"}
        for stage in (self.sft, self.train, self.evaluate):
            for f in dataclasses.fields(stage):
                if f.name in shared and getattr(stage, f.name) != _default(f):
                    room = _stage_name(stage)
                    raise ValueError(
                        f"{room}.{f.name}: quickstart sets it for every stage; set {f.name} itself"
                        if f.name not in ("adapter", "untuned", "trained")
                        else f"{room}.{f.name}: quickstart trains its own adapters; leave it unset"
                    )

    def stages(self) -> tuple[SftConfig, TrainConfig, EvalConfig]:
        """The three stages with the shared fields filled in."""
        shared: dict[str, Any] = {
            "model": self.model,
            "seed": self.seed,
            "threads": self.threads,
            "prompting": self.prompting,
        }
        sft = dataclasses.replace(self.sft, **shared, lora=self.lora, run_dir=self.run_dir)
        train = dataclasses.replace(
            self.train, **shared, lora=self.lora, run_dir=self.run_dir, reward=self.reward
        )
        evaluate = dataclasses.replace(self.evaluate, **shared, reward=self.reward)
        return sft, train, evaluate


def from_mapping(
    cls: type[T], mapping: Mapping[str, Any], *, path: str = "", base: T | None = None
) -> T:
    """Build the dataclass ``cls`` from nested mappings, checking names, types and ranges.

    Args:
        path: the name of ``mapping`` in its parent, for messages.
        base: what the fields that are left out are taken from; None: the class's defaults.

    Raises:
        ValueError: an unknown key (with the closest known one), a value of the wrong type or out of
            range; one line that starts with the field's path.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path or cls.__name__}: expected a mapping of fields, got {mapping!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(fields)}"
            raise ValueError(f'unknown configuration key "{name}"{hint}')
        # A group that names some of its fields keeps this class's defaults for the others, which
        # need not be those of the group's own class.
        default = _default(fields[key]) if base is None else getattr(base, key)
        values[key] = _coerce(value, hints[key], name, default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{path}.{error}" if path else str(error)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_mapping` (and JSON, and YAML) read back."""
    mapping: dict[str, Any] = _plain(dataclasses.asdict(config))
    return mapping


def load_yaml(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (None: all defaults), then apply overrides of the form ``a.b=value``."""
    import yaml

    mapping: Any = {}
    if path is not None:
        try:
            mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, dict):
            raise ValueError(
                f"{path}: expected a mapping of fields, got a {type(mapping).__name__}"
            )
    try:
        return from_mapping(cls, apply_overrides(mapping, overrides))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path is not None else str(error)) from None


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``mapping`` with every ``a.b=value`` set; values are read as YAML."""
    import yaml

    result: dict[str, Any] = _plain(mapping)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f'override "{override}": expected key=value')
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            value = text  # a plain string such as "hf:owner/name: x" need not be YAML
        *parents, last = key.strip().split(".")
        room = result
        for parent in parents:
            room = room.setdefault(parent, {})
            if not isinstance(room, dict):
                raise ValueError(f'override "{override}": "{parent}" is a value, not a group')
        room[last] = value
    return result


def check_sampling(name: str, params: SamplingParams) -> None:
    """Refuse what a stage sets itself, and values without a meaning."""
    _require(f"{name}.temperature", params.temperature, params.temperature >= 0, "0 or more")
    _require(f"{name}.top_k", params.top_k, params.top_k >= 0, "0 (off) or more")
    _require(f"{name}.top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1")
    _require(f"{name}.min_p", params.min_p, 0 <= params.min_p < 1, "at least 0 and below 1")
    _require(
        f"{name}.max_new_tokens", params.max_new_tokens, params.max_new_tokens >= 1, "1 or more"
    )
    _require(
        f"{name}.min_new_tokens",
        params.min_new_tokens,
        0 <= params.min_new_tokens <= params.max_new_tokens,
        f"between 0 and max_new_tokens ({params.max_new_tokens})",
    )
    _require(f"{name}.n", params.n, params.n == 1, "1: num_rewrites and num_responses say how many")
    _require(f"{name}.seed", params.seed, params.seed is None, "unset: it is derived from seed")
    _require(
        f"{name}.deadline_seconds",
        params.deadline_seconds,
        params.deadline_seconds is None,
        "unset: a deadline would make results depend on the clock",
    )


def _check_on_policy(params: SamplingParams) -> None:
    """The gradient is that of the untruncated policy, so that is what must be sampled."""
    _require(
        "rewrite.temperature",
        params.temperature,
        params.temperature > 0,
        "above 0: a greedy prompter explores nothing",
    )
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0, "ignore_eos": False}
    for name, value in off.items():
        _require(
            f"rewrite.{name}",
            getattr(params, name),
            getattr(params, name) == value,
            f"{value} in training: a truncated draw biases the policy gradient",
        )


def _check_optimizer(config: SftConfig | TrainConfig) -> None:
    _require("learning_rate", config.learning_rate, config.learning_rate > 0, "above 0")
    _require("warmup_steps", config.warmup_steps, config.warmup_steps >= 0, "0 or more")
    _require("weight_decay", config.weight_decay, config.weight_decay >= 0, "0 or more")
    _require("max_grad_norm", config.max_grad_norm, config.max_grad_norm > 0, "above 0")
    _require("seed", config.seed, 0 <= config.seed < 2**64, "between 0 and 2**64 - 1")
    if config.threads is not None:
        _require("threads", config.threads, config.threads >= 1, "at least 1")


def _check_micro_batches(config: SftConfig | TrainConfig) -> None:
    _require("memory_limit", config.memory_limit, config.memory_limit >= 1, "1 byte or more")
    size = config.micro_batch_size
    _require("micro_batch_size", size, size is None or size >= 1, "1 or more")


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _default(f: dataclasses.Field[Any]) -> object:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _stage_name(stage: SftConfig | TrainConfig | EvalConfig) -> str:
    return {SftConfig: "sft", TrainConfig: "train", EvalConfig: "evaluate"}[type(stage)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _coerce(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    """``value`` as the annotated type, or a ValueError naming the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if hint == Bytes:
        return _coerce_bytes(value, name)
    if origin is Literal:
        if value in arguments:
            return value
        choices = ", ".join(repr(a) for a in arguments)
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint_text = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}{hint_text}")
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return tuple(_coerce(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        base = default if isinstance(default, hint) else None  # type: ignore[arg-type]
        return from_mapping(hint, value, path=name, base=base)  # type: ignore[arg-type]
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {int: "an integer", str: "text", bool: "true or false", float: "a number"}
    raise ValueError(f"{name}: expected {kind.get(hint, hint)}, got {value!r}")


def _coerce_bytes(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?))?B", text)
    if match is None:
        raise ValueError(f'{name}: expected bytes, or text as "800MiB" or "1.5GB", got {value!r}')
    number, prefix, binary = match.groups()
    factor = (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)
    return int(float(number) * factor)


def _coerce_union(value: Any, arguments: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors: list[str] = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _coerce(value, argument, name)
        except ValueError as error:
            errors.append(str(error))
    alternatives = " or ".join(
        dict.fromkeys(e.removeprefix(f"{name}: expected ").split(", got ")[0] for e in errors)
    )
    nothing = " or null" if type(None) in arguments else ""
    raise ValueError(f"{name}: expected {alternatives}{nothing}, got {value!r}")
