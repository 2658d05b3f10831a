"""The native engine behind the seam: load a model file, generate, stream, score.

Long because every way into the model is a method of one class, which users know.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from alignpro import native
from alignpro.config import DEFAULT_MODEL, ModelConfig, check_local, target_of
from alignpro.models.adapter import AdapterWeights, LoraWeights, load_peft
from alignpro.models.adapter_files import CONFIG, TENSORS, adapter_folder
from alignpro.models.arguments import (
    Prompt,
    check_prompts,
    is_int,
    params_for,
    prompt_tokens,
    samples_of,
    token_lists,
    with_seed,
)
from alignpro.models.completion_text import TextStream
from alignpro.models.endpoint import EndpointModel
from alignpro.models.fingerprint import fingerprint
from alignpro.models.mixture import (
    PreparedMixture,
    check_streams,
    hint_of,
    prepare,
    score_tokens,
    soft_rows,
)
from alignpro.models.native_client import (
    NativeClient,
    NativeHandle,
    completion_or_error,
    of_prompt,
    prompt_end,
    report,
    stream,
)
from alignpro.models.redraw import DrawCounts
from alignpro.models.resolve import plain_name, published_name, resolve_model
from alignpro.models.soft_prompt import SoftPrompt, remember_place
from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Completion, SamplingParams

if TYPE_CHECKING:
    from alignpro.native import core

_log = logging.getLogger(__name__)

# _core.Adapter | LoraWeights | SoftPrompt | Mixture | PreparedMixture | path of their folder | None
AdapterLike = Any


def load_model(
    model: str | os.PathLike[str] | ModelConfig = DEFAULT_MODEL,
    threads: int | None = None,
    *,
    date: str | None = None,
    **options: Any,
) -> NativeModel:
    """Load a model file into the native engine.

    Args:
        model: a path or name with ``options``, or the group that says both.
        threads: None takes the container's CPU quota.
        date: what a chat template that asks for it is told, "2026-11-28"; None: today's, which the
            model then keeps.
        options: fields of `ModelConfig`: chat_template, chat_template_kwargs, device, compute,
            kv_dtype, deterministic, context_length, kv_cache_bytes, prefix_cache, max_batch_rows,
            lookup. An adapter goes to what is asked of the model, not to the base weights that are
            loaded here.

    Raises:
        FileNotFoundError: no such model.
        ModelFileError: its files are damaged or ask for what is not supported (a ValueError).
        ValueError: an option. UnavailableError: this machine, or no CUDA where it was asked for,
            or no cuBLASLt for ``deterministic=False``.
    """
    if isinstance(model, ModelConfig):
        config = replace(model, **options)
    else:
        config = ModelConfig(cast(str, model), **options)  # which takes a path, too
    if threads is not None and not (is_int(threads) and 1 <= threads <= _MOST_THREADS):
        raise ValueError(f"threads: expected an integer from 1 to {_MOST_THREADS}, got {threads!r}")
    if config.device == "cuda" and not native.core.cuda.is_available():
        reason = native.core.cuda.unavailable_reason()
        raise native.UnavailableError(f'device "cuda": {reason}')
    check_local("model", config, "`EndpointModel` is what stands for one")
    path = resolve_model(config.name)
    files = native.core.ModelFiles(str(path))
    tokenizer = Tokenizer.of(files).with_template(
        config.chat_template, config.chat_template_kwargs, date
    )
    made = native.core.Model.load(
        files,
        device=config.device,
        compute=config.resolved_compute,
        kv_dtype=config.resolved_kv_dtype,
        deterministic=config.deterministic,
        threads=threads or 0,
        context_length=config.context_length or 0,
        library_folders=wheel_folders() if config.device == "cuda" else (),
    )
    described = files.json("config.json") or {}
    if "vision_config" in described:
        _log.warning("%s: its encoder of images is left out: text is read and written", path)
    if described.get("tie_word_embeddings") and not made.config["tied_head"]:
        _log.warning(
            "%s: tie_word_embeddings is set, and lm_head.weight is another matrix than the "
            "embedding: the head of the file is used",
            path,
        )
    engine = native.core.Engine(
        made,
        kv_cache_bytes=config.kv_cache_bytes or 0,
        max_batch_rows=config.max_batch_rows,
        prefix_cache=config.prefix_cache,
        lookup=config.lookup,
    )
    source = (files.metadata() or {}).get("general.source.repo_url") or ""
    return NativeModel(
        name=config.name,
        path=path,
        tokenizer=tokenizer,
        model=made,
        engine=engine,
        published_name=published_name(config.name, path, source),
    )


def load_models(
    prompter: ModelConfig,
    target: ModelConfig | None,
    threads: int | None = None,
    *,
    calls: Path | None = None,
    date: str | None = None,
) -> tuple[NativeModel, NativeModel | EndpointModel]:
    """Prompter and target of a stage; one engine where they are the same base weights run alike,
    and one object where their chats are written alike, too.

    Args:
        calls: the file of calls of a target behind an endpoint; see `EndpointModel`.
        date: as of `load_model`.

    Raises as `load_model` and `EndpointModel`, and ValueError for a model whose template cannot
    write a prompt.
    """
    wanted = target_of(prompter, target)
    if wanted.endpoint is not None:
        answers = EndpointModel(wanted, calls)  # first: it says at once what is missing
        return _that_chats("prompter", load_model(prompter, threads, date=date)), answers
    first = _that_chats("prompter", load_model(prompter, threads, date=date))
    second = reusable(wanted, [(prompter, first)]) or load_model(wanted, threads, date=date)
    return first, _that_chats("target", second)


def _that_chats(role: str, model: NativeModel) -> NativeModel:
    try:
        model.tokenizer.encode_chat([{"role": "user", "content": "a"}])
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from None
    return model


def reusable(
    wanted: ModelConfig,
    loaded: Sequence[tuple[ModelConfig, NativeModel]],
    date: str | None = None,
) -> NativeModel | None:
    """What is loaded already and would be loaded again, if anything, with its chat template.

    Args:
        date: what its template is told; None: what it is told already.
    """
    for config, model in loaded:
        same = wanted.name == config.name or resolve_model(wanted.name).samefile(model.path)
        if same and wanted.runs_like(config):
            return model.with_template(wanted.chat_template, wanted.chat_template_kwargs, date)
    return None


_MOST_THREADS = 1024


def wheel_folders() -> list[str]:
    """Where the wheels of NVIDIA's libraries, which torch's CUDA build brings, keep them."""
    spec = importlib.util.find_spec("nvidia")
    roots = () if spec is None else spec.submodule_search_locations or ()
    return [str(folder) for root in roots for folder in sorted(Path(root).glob("*/lib"))]


class NativeModel:
    """A model in the native engine, with its tokenizer. Safe to use from many threads: they share
    the engine's steps, and no request ends another's or changes its bits."""

    def __init__(
        self,
        *,
        name: str,
        path: Path,
        tokenizer: Tokenizer,
        model: core.Model,
        engine: core.Engine,
        published_name: str = "",
    ) -> None:
        self.name = name
        self.published_name = published_name or name  # by which others find its base weights
        self.path = path
        self.tokenizer = tokenizer
        self.core_model = model
        self.config: dict[str, Any] = model.config
        self.lora_modules: dict[str, tuple[int, int]] = model.lora_modules()
        self._engine = engine
        self._knows_token_bytes = False
        self._adapters: weakref.WeakKeyDictionary[AdapterWeights, core.Adapter] = (
            weakref.WeakKeyDictionary()
        )
        self._adapter_files: dict[Path, tuple[tuple[int, int], core.Adapter]] = {}
        self.draw_counts = DrawCounts()

    def __repr__(self) -> str:
        return f"NativeModel({self.name!r}, path={str(self.path)!r})"

    @property
    def context_length(self) -> int:
        """Positions that prompt and completion share."""
        return int(self.config["context_length"])

    @property
    def bit_exact(self) -> bool:
        """Whether scored log-probabilities are the sampled ones to the bit: see `deterministic`."""
        return bool(self.config["deterministic"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the files: weights, configuration and tokenizer."""
        return fingerprint(self.path)

    def with_template(
        self,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> NativeModel:
        """The same weights in the same engine, whose chats are written otherwise; the model itself
        where they are not. See `Tokenizer.with_template`; without a ``date``, its own."""
        tokenizer = self.tokenizer.with_template(template, variables, date or self.tokenizer.date)
        if tokenizer.template_settings == self.tokenizer.template_settings:
            return self
        other = copy.copy(self)
        other.tokenizer = tokenizer
        return other

    # --- whole completions ---

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterLike = None,
        on_token: Callable[[int, int, float], None] | None = None,
        errors: Literal["raise"] = "raise",
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterLike = None,
        on_token: Callable[[int, int, float], None] | None = None,
        errors: Literal["return"],
    ) -> list[Completion | Exception]: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterLike = None,
        on_token: Callable[[int, int, float], None] | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Completion] | list[Completion | Exception]:
        """Complete every prompt, all of them in one batch; Ctrl-C cancels what is under way.

        Draws are keyed by (seed, sample, position): the same request gives the same tokens whatever
        else is generated. Without a seed every prompt gets a fresh one.

        Args:
            prompts: token ids, chats, or texts (one user turn each, in the chat template). With a
                soft prompt, token ids hold its rows as -1, -2, ...; the others are given them.
            params: one for all, or one per prompt; None is ``SamplingParams()``.
            adapter: what to generate with: `LoraWeights`, a `SoftPrompt`, a `Mixture`, a folder of
                one, or from `prepare`.
            on_token: called with (index of the completion, token, log-probability) as they come; an
                exception in it cancels everything and is raised.
            errors: "raise" the first of them, or "return" each in the place of the completions
                that it cost, beside those of the requests that went well.

        Returns:
            Completions prompt by prompt, ``params.n`` for each.

        Raises:
            ValueError: an empty prompt, one over the context, or parameters out of range.
            NumericError: no token can be drawn, for NaN or infinite logits. Both name the index
                of the prompt.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f'errors: expected "raise" or "return", got {errors!r}')
        prompts = check_prompts(prompts)
        each = params_for(params, len(prompts))
        prepared = self.prepare(adapter)
        rows = soft_rows(prepared)
        if on_token is not None:
            check_streams(prepared)
        handles: list[NativeHandle] = []  # of what was submitted
        places: list[tuple[int, NativeHandle | Exception]] = []  # prompt, and what came of it
        with self.client() as client:
            for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                try:
                    tokens = prompt_tokens(self.tokenizer, prompt, self.context_length, rows)
                    keyed = with_seed(one)
                    for sample in range(one.n):
                        handles.append(
                            client.submit(tokens, keyed, adapter=prepared, sample=sample)
                        )
                        places.append((index, handles[-1]))
                except ValueError as error:
                    if errors == "raise":
                        raise of_prompt(index, error) from None
                    places += [(index, error)] * samples_of(one)
            if on_token is None:
                client.run()
            else:
                report(client, handles, on_token)
        outcomes = [completion_or_error(index, place) for index, place in places]
        if errors == "raise":
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
        return outcomes

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: AdapterLike = None
    ) -> Iterator[tuple[int, str, float]]:
        """(token, text it adds, log-probability), as they come. Closing the iterator cancels.

        Text arrives in whole characters, and not before it is certain that no stop string cuts it;
        joined, it is the completion's text, to which a block of reasoning adds nothing. Raises as
        `generate`, on this call.
        """
        one = params if params is not None else SamplingParams()
        if one.n != 1:
            raise ValueError(f"n: stream() writes 1 completion, got n = {one.n}")
        prepared = self.prepare(adapter)
        check_streams(prepared)
        client = self.client()
        tokens = prompt_tokens(self.tokenizer, prompt, self.context_length, soft_rows(prepared))
        handle = client.submit(tokens, one, adapter=prepared)
        text = TextStream(self.tokenizer, one.stop, prompt_end(self.tokenizer, tokens))
        pieces = stream(client, handle, text)
        # Dropped before its first token, a generator runs none of its own clean-up.
        weakref.finalize(pieces, handle.cancel).atexit = False
        return pieces

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        adapter: AdapterLike = None,
        temperature: float = 1.0,
    ) -> list[NDArray[np.float32]]:
        """log p(token i | tokens before i) for i = 1 ... len - 1; one float32 [len - 1] a sequence.
        Of a mixture, as it draws token by token. Rows of a soft prompt (-1, -2, ...) and what is
        before them are not scored: i then begins behind the last.

        Raises:
            ValueError: an empty sequence, one over the context, an id outside of the vocabulary;
                one without the rows of the soft prompt that it is read with.
        """
        rows = token_lists(sequences, soft_rows(adapter))
        if not rows:
            return []
        starts = [
            max((i + 1 for i, token in enumerate(row) if token < 0), default=1) for row in rows
        ]
        score = score_tokens(self, rows, starts, adapter=adapter, temperature=temperature)
        flat = np.array(score.logprob, np.float32)
        ends = np.cumsum([len(row) - start for row, start in zip(rows, starts, strict=True)])
        return np.split(flat, ends[:-1])

    # --- the seam ---

    def client(self) -> NativeClient:
        """See `LanguageModel.client`."""
        return NativeClient(self, self._engine)

    def ready(self) -> bool:
        """Whether a step would not wait for one that was launched."""
        return self._engine.ready()

    def send_token_bytes(self) -> None:
        """Tell the engine the bytes of every token, which stop strings need."""
        if not self._knows_token_bytes:
            # A tokenizer may know ids that the model has no rows for; it can never write them.
            self._engine.set_token_bytes(self.tokenizer.token_bytes()[: self.config["vocab_size"]])
            self._knows_token_bytes = True

    def stats(self) -> dict[str, int | float]:
        """Counters: prefill_tokens, cached_tokens, decode_tokens, steps, kv_blocks_*; and of
        decode_tokens, accepted_tokens, which were among the drafted_tokens of `lookup`; and those
        of `redraw.DrawCounts`."""
        return {**self._engine.stats(), **self.draw_counts.stats()}

    # --- adapters ---

    def make_adapter(self, adapter: AdapterLike) -> core.Adapter | None:
        """The engine's copy of an adapter. The same object, or the same unchanged PEFT folder,
        gives the same copy, so that its KV cache is shared.

        Raises:
            ValueError: modules or shapes this model does not have, or a mixture, which `prepare`
                takes; FileNotFoundError: no folder.
        """
        if adapter is None or isinstance(adapter, native.core.Adapter):
            return adapter
        if isinstance(adapter, (str, os.PathLike)):
            return self._adapter_from_folder(Path(adapter))
        if not isinstance(adapter, AdapterWeights):
            expected = "adapter: expected LoraWeights, a SoftPrompt, a PEFT folder or None"
            raise ValueError(f"{expected}, got {type(adapter).__name__}{hint_of(adapter)}")
        made = self._adapters.get(adapter)
        if made is None:  # of two threads that make one, both take the first's
            made = self._adapters.setdefault(adapter, self._made(adapter))
        return made

    def _made(self, adapter: AdapterWeights) -> core.Adapter:
        if isinstance(adapter, LoraWeights):
            return self.core_model.make_adapter(adapter.matrices, adapter.scale)
        made = self.core_model.make_adapter({}, 1.0, adapter.rows)
        remember_place(made, adapter.placed)
        return made

    def prepare(self, adapter: AdapterLike) -> core.Adapter | PreparedMixture | None:
        """The engine's copy of what text is drawn with: an adapter or a mixture of them.

        Raises as `make_adapter`, naming the member of a mixture.
        """
        return prepare(self, adapter)

    def load_adapter(self, folder: str | os.PathLike[str]) -> AdapterWeights:
        """An adapter's files; a warning says where they were trained for another base.

        Raises as `load_peft`.
        """
        weights = load_peft(Path(folder), self.lora_modules, self.base_table)
        if isinstance(weights, SoftPrompt):
            width, hidden = weights.rows.shape[1], self.config["hidden_size"]
            if width != hidden:
                raise ValueError(
                    f"{folder}: a soft prompt of rows of {width} numbers; {self.name} has {hidden}"
                )
        if not self._is_base_of(weights):
            _log.warning(
                "%s: trained for %s, loaded on %s, whose weights are others",
                folder,
                weights.base_model_name,
                self.name,
            )
        return weights

    def base_table(self, name: str) -> NDArray[np.float32]:
        """The base's "embed_tokens" or "lm_head", [vocab, hidden], read from its files."""
        return native.core.ModelFiles(str(self.path)).table(name)

    def _adapter_from_folder(self, folder: Path) -> core.Adapter:
        folder = adapter_folder(folder).resolve()
        files = (folder / CONFIG, folder / TENSORS)
        try:
            changed = (files[0].stat().st_mtime_ns, files[1].stat().st_mtime_ns)
        except OSError:
            changed = (0, 0)  # load_peft says what is missing
        known = self._adapter_files.get(folder)
        if known is not None and known[0] == changed:
            return known[1]
        made = self._made(self.load_adapter(folder))
        self._adapter_files[folder] = (changed, made)
        return made

    # --- within ---

    def _is_base_of(self, weights: AdapterWeights) -> bool:
        """By the hash of the base's files, or, of an adapter that came without, by its name."""
        if weights.base_fingerprint:
            return weights.base_fingerprint == self.fingerprint
        named = weights.base_model_name
        return not named or plain_name(named) in {
            plain_name(part) for part in (self.name, *self.path.parts)
        }
