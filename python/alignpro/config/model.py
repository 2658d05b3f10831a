"""A model and how it is run: the one group that every stage and `models.load_model` read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from alignpro.config.endpoint import Budget, ClientConfig, check_url
from alignpro.config.fields import Bytes, Place, Range, at_least, checked, only_default, require

DEFAULT_MODEL = "smollm2"
_OF_ENDPOINTS = {
    *("model", "endpoint", "api_key_env", "client", "max_failed", "chat_template_kwargs")
}
# By device, the device's own first. A device keeps keys and values as it computes.
_COMPUTE = {"cpu": ("float32", "int8"), "cuda": ("bfloat16", "float32")}


@dataclass(frozen=True)
@checked
class ModelConfig:
    """A model and how it is run. A text alone is its path or name: ``target: smollm2``."""

    text_field: ClassVar[str] = "model"

    model: Place | None = None
    """A .gguf file, a folder with config.json and safetensors, or a name; null is smollm2, and of a
    target the prompter's model.

    With endpoint, what the endpoint calls its model. Names are found by `alignpro.resolve_model`.
    """
    endpoint: str | None = None
    """The OpenAI-compatible endpoint of a target, such as "https://.../v1"; null is a model in this
    process."""
    api_key_env: str | None = None
    """The environment variable that holds the endpoint's key, which is never stored; null is for an
    endpoint without keys."""
    client: ClientConfig = field(default_factory=ClientConfig)
    """How the endpoint is asked."""
    max_failed: Annotated[float, Range(lambda v: 0 <= v < 1, "at least 0 and below 1")] = 0.1
    """The share of a step's responses that may fail and be left out, instead of ending the run.

    Of a target: no answer after all retries, or a rewrite that does not fit. One response always
    may fail, but with 0.
    """
    chat_template: str | None = None
    """How chats are written: a name among the templates of the model's files, a file, or the text
    of a template; null is the files' own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {enable_thinking: false}.

    An endpoint is sent them under this name, as vLLM and SGLang take it.
    """
    adapter: Place | None = None
    """The PEFT folder of an adapter that takes part; null is the base weights alone."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; cuda is the current CUDA device, in a build with CUDA."""
    compute: Literal["float32", "int8", "bfloat16"] | None = None
    """The arithmetic of the products; null is float32 on the CPU and bfloat16 on CUDA.

    float32, on either: weights, activations, keys and values in it. bfloat16, on CUDA: the same,
    sums in float32. int8, on the CPU, for a frozen model whose speed matters more than the last
    digits: weights as stored codes (floats become Q8_0), activations quantised in groups of 32;
    it has no gradients. A model scores with the arithmetic that it samples with.
    """
    kv_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type of cached keys and values; null is float32 on the CPU and that of compute on CUDA.

    float16, on the CPU: keys and values in half the memory, rounded in sampling and scoring alike;
    no gradients. One that float16 cannot hold (beyond 65504) is a NumericError.
    """
    deterministic: bool = True
    """Whether sampled and scored log-probabilities are equal to the bit, whatever shares the batch.

    False, on CUDA: the layers' products by cuBLASLt, whose order of sums goes by the number of
    rows; the two then differ a little (docs/cuda.md).
    """
    context_length: Annotated[int, at_least(1)] | None = None
    """The most tokens of prompt and answer together; null is the model's own limit."""
    kv_cache_bytes: Bytes | None = None
    """Memory of cached keys and values, such as "1.5GB"; null is up to a quarter of what is
    available.

    On CUDA null is half of what is free after the weights.
    """
    prefix_cache: bool = True
    """Whether shared beginnings of prompts are computed once."""
    max_batch_rows: Annotated[int, at_least(1)] = 256
    """The most tokens in one forward pass."""
    lookup: bool = True
    """Whether tokens that followed the same text before, in the prompt or in what was written
    lately, are verified several in one step, where one to four sequences are written and that is
    faster.

    Tokens and log-probabilities are the same to the bit either way. With ``deterministic: false``
    nothing is looked up, as nothing is for a request with penalties.
    """

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            check_url("endpoint", self.endpoint)
            named = bool((self.model or "").strip())
            require("model", self.model, named, "the endpoint's name for its model")
            for f in fields(self):
                if f.name not in _OF_ENDPOINTS:
                    only_default(self, f.name, "with a model in this process")
            return
        for name in ("api_key_env", "client"):
            only_default(self, name, "with endpoint")
        device, compute = self.device, self.resolved_compute
        cache = ("float32", "float16") if device == "cpu" else (compute,)
        modes = (True,) if device == "cpu" else (True, False)
        for name, value, allowed in (
            ("compute", compute, _COMPUTE[device]),
            ("kv_dtype", self.resolved_kv_dtype, cache),
            ("deterministic", self.deterministic, modes),
        ):
            words = " or ".join(str(choice).lower() for choice in allowed)
            require(name, value, value in allowed, f"{words} with device {device}")

    @property
    def name(self) -> str:
        """``model``, or the one that everything works with as it is."""
        return self.model or DEFAULT_MODEL

    @property
    def resolved_compute(self) -> str:
        """``compute``, or the device's own."""
        return self.compute or _COMPUTE[self.device][0]

    @property
    def resolved_kv_dtype(self) -> str:
        """``kv_dtype``, or what the device keeps keys and values in."""
        return self.kv_dtype or ("float32" if self.device == "cpu" else self.resolved_compute)

    def runs_like(self, other: ModelConfig) -> bool:
        """Whether one engine can serve both, where they have the same base weights."""

        def plain(config: ModelConfig) -> tuple[ModelConfig, str, str]:
            bare = replace(
                config, model=None, adapter=None, compute=None, kv_dtype=None, max_failed=0.0
            )
            bare = replace(bare, chat_template=None, chat_template_kwargs=None)
            return bare, config.resolved_compute, config.resolved_kv_dtype

        here = self.endpoint is None and other.endpoint is None
        return here and plain(self) == plain(other)


PROMPTER = ModelConfig(DEFAULT_MODEL)
# Paths of fields that decide how fast, in how much memory and by which server a model answers, not
# what it answers.
HOW_IT_RUNS = frozenset(
    {
        *("kv_cache_bytes", "prefix_cache", "max_batch_rows", "lookup"),
        *("endpoint", "api_key_env", "max_failed"),
        *(f"client.{f.name}" for f in fields(ClientConfig) if f.name not in ("body", "budget")),
        *(f"client.budget.{f.name}" for f in fields(Budget)),
    }
)


def target_of(prompter: ModelConfig, target: ModelConfig | None) -> ModelConfig:
    """The target with its model named. None: the prompter's base weights, run as the prompter is;
    a group that names no model is of the prompter's."""
    if target is None:
        return replace(prompter, adapter=None)
    return target if target.model is not None else replace(target, model=prompter.model)


PROMPTER_HERE = "a prompter is a model in this process; a target may be behind an endpoint"


def check_local(name: str, model: ModelConfig, reason: str) -> None:
    """Refuse a model behind an endpoint."""
    require(f"{name}.endpoint", model.endpoint, model.endpoint is None, f"null: {reason}")


def check_trainable(name: str, model: ModelConfig) -> None:
    """Refuse what has no gradients."""
    check_local(name, model, "it is trained, and scored, in this process")
    compute, cache = model.resolved_compute, model.resolved_kv_dtype
    expected = "float32 or bfloat16 where it is trained: {} has no gradients"
    require(f"{name}.compute", compute, compute != "int8", expected.format("int8"))
    require(f"{name}.kv_dtype", cache, cache != "float16", expected.format("float16"))


def trained_of(policy: str, prompter: ModelConfig, target: ModelConfig | None) -> ModelConfig:
    """The model that a policy, "prompter" or "target", trains; its adapter is where that starts."""
    return target_of(prompter, target) if policy == "target" else prompter


def check_policy(policy: str, prompter: ModelConfig, target: ModelConfig | None) -> None:
    """Refuse an adapter of a model that is not trained, and what has no gradients."""
    if policy == "target":
        expected = "null: target.adapter is tuned"
        require("prompter.adapter", prompter.adapter, prompter.adapter is None, expected)
    name = "target" if target is not None and policy == "target" else "prompter"
    check_trainable(name, trained_of(policy, prompter, target))
