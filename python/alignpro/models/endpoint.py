"""A model behind an OpenAI-compatible endpoint, as a `ChatModel`: a target, or a judge."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpro.config import ClientConfig, ModelConfig
from alignpro.models.arguments import with_seed
from alignpro.models.calls import SCORE, Call, CallFile
from alignpro.models.dialect import NEUTRAL
from alignpro.models.http_client import HttpClient
from alignpro.models.language_model import RequestError
from alignpro.models.reply import Answer
from alignpro.types import Chat, Completion, SamplingParams, Usage


class EndpointModel:
    """What ``config.endpoint`` calls ``config.model``. Nothing is asked before the first request.

    Args:
        calls: the file of every call and its answer, unless ``config.client.calls`` names another.
            What is in it already is replayed: a call that asks for the same is not made again.

    Raises:
        ValueError: there is no key and nothing to replay, or ``calls`` is no such file.
        FileNotFoundError: the folder of ``config.client.calls``.
        FileExistsError: another process adds to ``config.client.calls``; where something is in it,
            the first call that is not raises that.
    """

    def __init__(self, config: ModelConfig, calls: Path | None = None) -> None:
        self.name = config.name
        self.endpoint = config.endpoint
        named = config.client.calls
        if named is not None and not Path(named).parent.is_dir():
            raise FileNotFoundError(f"client.calls: {Path(named).parent}: no such folder")
        self.calls = CallFile(calls if named is None else Path(named))
        self._config = config
        self._http = HttpClient(config, self.calls)
        self._under_way: dict[str, _Shared] = {}  # by key
        self._joining = threading.RLock()
        if not len(self.calls):
            self._http.read_key()
            if named is not None:
                self.calls.hold()

    def __repr__(self) -> str:
        return f"EndpointModel({self.name!r}, {self.endpoint!r})"

    def client(self) -> EndpointClient:
        """See `ChatModel.client`."""
        return EndpointClient(self)

    def answer(self, call: Call) -> Future[Answer]:
        """The recorded answer, that of the same call under way, or a new one; a future of the
        caller's own, which may be cancelled while others wait for the same."""
        with self._joining:
            under_way = self._under_way.get(call.key)
            known = None if under_way is not None else self.calls.get(call)
            if under_way is None and known is None and self.calls.hold():
                known = self.calls.get(call)
            if under_way is None and known is None:
                started = self._http.start(call)
                under_way = self._under_way[call.key] = _Shared(started, self._joining)
                # By then the file has the answer.
                started.add_done_callback(lambda _: self._under_way.pop(call.key, None))
            if under_way is not None:
                return under_way.join()
        assert known is not None
        future: Future[Answer] = Future()
        if isinstance(known, str):
            future.set_exception(RequestError(known))
        else:
            future.set_result(known)
        return future

    @property
    def tells_logprobs(self) -> bool:
        """Whether answers are asked for with their log-probabilities."""
        return self._config.client.logprobs

    def call(self, conversation: Chat, params: SamplingParams, sample: int) -> Call:
        """What is asked for, in the words of OpenAI, and of vLLM where they have none."""
        assert params.seed is not None
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [dict(message) for message in conversation],
            "temperature": params.temperature,
            "max_tokens": params.max_new_tokens,
            # Draws differ also at an endpoint that takes seeds and knows no samples.
            "seed": _short_seed(params.seed, sample),
            **NEUTRAL,  # llama.cpp truncates otherwise, and vLLM as the model's files say
        }
        plain = SamplingParams()
        for ours, theirs in _NAMES.items():
            value = getattr(params, ours)
            if value != getattr(plain, ours):
                body[theirs] = list(value) if isinstance(value, tuple) else value
        if self._config.client.logprobs:
            body |= {"logprobs": True, "return_token_ids": True}  # the latter for vLLM
        if self._config.chat_template_kwargs:
            body["chat_template_kwargs"] = self._config.chat_template_kwargs
        body |= self._config.client.body or {}
        return Call({k: v for k, v in body.items() if v is not None}, params.seed, sample)

    def token_logprobs(
        self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[NDArray[np.float64]]:
        """log p(continuation | prompt), token by token in nats, at temperature 1.

        Raises:
            RequestError: the endpoint does not tell them; vLLM does.
        """
        given = [p + c for p, c in zip(prompts, continuations, strict=True)]
        fixed = {"model": self.name, "max_tokens": 1, "temperature": 1.0}
        fixed |= {"echo": True, "logprobs": 1}
        calls = [Call({"prompt": tokens, **fixed}, 0, 0, SCORE) for tokens in given]
        found = [self.answer(call) for call in calls]
        return [
            np.asarray(future.result().logprobs[len(prompt) - 1 :], np.float64)
            for prompt, future in zip(prompts, found, strict=True)
        ]

    def check_logprobs(self) -> None:
        """Ask for one token, to know that the endpoint tells log-probabilities: of what it writes,
        with the tokens themselves and those that it read, and of given tokens.

        Raises:
            ValueError: it does not, or does not answer.
        """
        params = SamplingParams(max_new_tokens=1, seed=0)
        where = f"target.endpoint: {self.name} at {self.endpoint}"
        try:
            answer = self.answer(self.call([{"role": "user", "content": "Hi"}], params, 0)).result()
        except RequestError as error:
            raise ValueError(f"{where}: {error}") from None
        missing = "" if answer.logprobs else "log-probabilities of what it writes (logprobs)"
        if not missing and not (answer.tokens and answer.prompt_tokens):
            missing = "the tokens that it reads and writes (return_token_ids)"
        if not missing:
            try:
                self.token_logprobs([answer.prompt_tokens], [answer.tokens])
            except RequestError as error:
                missing = f"log-probabilities of given tokens (echo): {error}"
        if missing:
            raise ValueError(
                f"{where} does not tell {missing}; vLLM does, and a model in this process"
            )

    def usage(self, answer: Answer | None = None) -> Usage:
        """What an answer took, at the configured prices; None: all that the file of calls holds."""
        of = self.calls if answer is None else answer
        return priced(of.input_tokens or 0, of.output_tokens or 0, self._config.client)

    def spent(self) -> str:
        """What was asked for so far, in words."""
        calls, total = self.calls, self.usage()
        cost = "" if total.cost is None else f", cost {total.cost:.4g}"
        return (
            f"{self.name}: {calls.attempts:,} calls, {total.input_tokens:,} tokens read, "
            f"{total.output_tokens:,} written{cost}; {calls.replayed:,} answers replayed"
        )


class _Shared:
    """A call under way that several may wait for; it is cancelled when the last of them is."""

    def __init__(self, call: Future[Answer], joining: threading.RLock) -> None:
        self._call, self._joining = call, joining
        self._waiting: set[Future[Answer]] = set()

    def join(self) -> Future[Answer]:
        own: Future[Answer] = Future()
        self._waiting.add(own)
        own.add_done_callback(self._leave)
        self._call.add_done_callback(lambda call: _copy(call, own))
        return own

    def _leave(self, own: Future[Answer]) -> None:
        with self._joining:
            self._waiting.discard(own)
            if own.cancelled() and not self._waiting:
                self._call.cancel()


def _copy(call: Future[Answer], own: Future[Answer]) -> None:
    with suppress(InvalidStateError):  # it was cancelled meanwhile
        if call.cancelled():
            own.cancel()
        elif (error := call.exception()) is not None:
            own.set_exception(error)
        else:
            own.set_result(call.result())


class EndpointHandle:
    """One answer under way."""

    def __init__(self, model: EndpointModel, call: Call) -> None:
        self._model, self._call = model, call
        self.future = model.answer(call)

    def completion(self) -> Completion:
        """What was answered.

        Raises:
            RequestError: nothing, after all retries. EndpointError, BudgetError: see there.
        """
        if not self.future.done():
            raise RuntimeError("the request is not finished; step() its client until it is")
        try:
            answer = self.future.result()
        except RequestError as error:
            reason = str(error)

            def accept() -> None:
                self._model.calls.put_failure(self._call, reason)

            raise RequestError(reason, accept) from None
        text, finish_reason = answer.text, answer.finish_reason
        cut = [at for stop in self._call.body.get("stop", ()) if (at := text.find(stop)) >= 0]
        if cut:  # by an endpoint that was not told, or leaves the stop text in
            text, finish_reason = text[: min(cut)], "stop"
        return Completion(
            tokens=answer.tokens,
            text=text,
            logprobs=answer.logprobs,
            kept_mass=[],
            finish_reason=finish_reason,
            prompt_tokens=answer.prompt_tokens,
            reasoning=answer.reasoning,
            usage=self._model.usage(answer),
        )


class EndpointClient:
    """See `language_model.ChatClient`."""

    def __init__(self, model: EndpointModel) -> None:
        self._model = model
        self._finished: queue.SimpleQueue[EndpointHandle] = queue.SimpleQueue()
        self._under_way: set[EndpointHandle] = set()

    def submit(
        self, conversation: Chat, params: SamplingParams, *, sample: int = 0
    ) -> EndpointHandle:
        """Queue one answer; see `language_model.ChatClient.submit`."""
        call = self._model.call(conversation, with_seed(params), sample)
        handle = EndpointHandle(self._model, call)
        self._under_way.add(handle)
        handle.future.add_done_callback(lambda _: self._finished.put(handle))
        return handle

    def step(self) -> Sequence[EndpointHandle]:
        """What has finished; where nothing has, the next that does."""
        if self.idle():
            return []
        finished = [self._finished.get()]
        while not self._finished.empty():
            finished.append(self._finished.get())
        self._under_way.difference_update(finished)
        return finished

    def launch(self) -> None:
        """Calls are under way by themselves."""

    def ready(self) -> bool:
        return not self._finished.empty()

    def cancel(self) -> None:
        for handle in self._under_way:
            handle.future.cancel()

    def idle(self) -> bool:
        return not self._under_way


def priced(read: int, written: int, client: ClientConfig) -> Usage:
    """Tokens with what they cost, where both prices are known."""
    if client.input_price is None or client.output_price is None:
        return Usage(read, written)
    return Usage(read, written, (read * client.input_price + written * client.output_price) / 1e6)


# Of `SamplingParams`, sent where they are not the defaults.
_NAMES = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "stop": "stop",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop_token_ids": "stop_token_ids",
}


def _short_seed(seed: int, sample: int) -> int:
    """31 bits, which every endpoint takes."""
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
