"""One caller's requests in the native engine, and what came of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from alignpro import native
from alignpro.models.arguments import core_params, token_list, with_seed
from alignpro.models.completion_text import TextStream, completion_text
from alignpro.models.mixture import PreparedMixture
from alignpro.models.reasoning import OPENING_TOKENS, split_reasoning
from alignpro.models.redraw import Redraw, judge
from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Completion, FinishReason, SamplingParams

if TYPE_CHECKING:
    from alignpro.models.native_model import NativeModel
    from alignpro.native import core


class NativeHandle:
    """One request in the engine: a sequence, or the last of those that were drawn for it. Any
    thread may read and cancel it."""

    def __init__(
        self, sequence: core.Sequence_, tokenizer: Tokenizer, redraw: Redraw | None = None
    ) -> None:
        self.sequence = sequence
        self.redraw = redraw
        self.cancelled = False
        self._tokenizer = tokenizer

    @property
    def finished(self) -> bool:
        return self.sequence.finished and (self.redraw is None or self.redraw.done)

    def cancel(self) -> None:
        self.cancelled = True
        self.sequence.cancel()

    def completion(self) -> Completion:
        """What was written; ``text`` is the answer, "" of one that was cut in its reasoning.

        Raises:
            RuntimeError: it is not finished. What ended it: NumericError where no token could be
                drawn, and any error of the engine itself.
        """
        sequence = self.sequence
        reason = sequence.finish_reason
        if reason is None or not self.finished:
            raise RuntimeError("the sequence is not finished; step() its client until it is")
        if self.redraw is not None and self.redraw.error is not None:
            raise self.redraw.error
        sequence.raise_error()
        tokens, read = sequence.tokens, sequence.prompt_tokens
        written = completion_text(self._tokenizer, tokens, reason, sequence.matched_stop)
        answer, reasoning = split_reasoning(written, prompt_end(self._tokenizer, read))
        return Completion(
            tokens=tokens,
            text=answer or "",
            logprobs=sequence.logprobs,
            kept_mass=sequence.kept_mass,
            finish_reason=cast(FinishReason, reason),
            prompt_tokens=read,
            reasoning=reasoning,
            answered=bool(answer) or (answer is not None and not reasoning),
        )


class NativeClient:
    """See `language_model.Client`. Leaving its ``with`` block by an exception, Ctrl-C and closing
    included, cancels what is under way."""

    def __init__(self, model: NativeModel, engine: core.Engine) -> None:
        self._model = model
        self._client = native.core.Client(engine)
        self._handles: dict[core.Sequence_, NativeHandle] = {}
        self._ended: list[NativeHandle] = []  # by run(), for step() to return

    def __enter__(self) -> NativeClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.cancel()

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        adapter: Any = None,
        sample: int = 0,
    ) -> NativeHandle:
        """Queue one sequence; see `language_model.Client.submit`."""
        params = with_seed(params)
        compiled = core_params(params, sample)
        device = self._model.core_model.config["device"]
        if compiled.penalises and device != "cpu":
            raise ValueError(
                f"repetition, presence and frequency penalties: device {device!r} draws without "
                "them; leave them out, or load the model on the CPU"
            )
        if params.stop:
            self._model.send_token_bytes()
        read, prepared, redraw = token_list(tokens, "prompt"), self._model.prepare(adapter), None
        if isinstance(prepared, PreparedMixture):
            if prepared.sampling == "sequence":
                redraw = Redraw(prepared, read, params, sample)
            sequence = self._client.submit(read, compiled, prepared.made)
        else:
            sequence = self._client.submit(read, compiled, prepared)
        handle = NativeHandle(sequence, self._model.tokenizer, redraw)
        self._handles[sequence] = handle
        return handle

    def step(self) -> list[NativeHandle]:
        """One forward pass for everything in the engine, unless something of this client has
        finished already; returns what has finished since the last call."""
        ended, self._ended = self._ended, []
        return ended or self._settled(self._client.step())

    def _settled(self, finished: Sequence[core.Sequence_]) -> list[NativeHandle]:
        """The requests that are done with these sequences; others are drawn anew."""
        handles = [(sequence, self._handles[sequence]) for sequence in finished]
        judged = [
            (handle.redraw, sequence)
            for sequence, handle in handles
            if handle.redraw is not None and sequence.finish_reason in ("stop", "length")
        ]
        if judged:
            judge(self._model.core_model, judged)
            self._model.draw_counts.add([redraw for redraw, _ in judged])
        ended = []
        for sequence, handle in handles:
            redraw = handle.redraw
            whole = redraw is not None and sequence.finish_reason in ("stop", "length")
            if redraw is not None and whole and not redraw.done and not handle.cancelled:
                again = self._client.submit(
                    redraw.tokens,
                    core_params(redraw.next_params(), redraw.sample),
                    redraw.mixture.made,
                )
                self._handles[again] = handle
                handle.sequence = again
                if handle.cancelled:  # between the two looks
                    again.cancel()
            else:
                if redraw is not None:
                    late = sequence.finish_reason == "deadline"
                    if redraw.best is not None and (whole or late):
                        handle.sequence = redraw.best
                    redraw.done = True
                ended.append(handle)
            del self._handles[sequence]
        return ended

    def run(self) -> None:
        """Step until all of it is finished; Ctrl-C cancels it."""
        self._client.run()
        while any(handle.redraw is not None for handle in list(self._handles.values())):
            self._ended += self._settled(self._client.step())
            self._client.run()

    def launch(self) -> None:
        """See `language_model.Requests.launch`: on a GPU a step goes on beside another model's."""
        self._client.launch()

    def ready(self) -> bool:
        return self._model.ready()

    def cancel(self) -> None:
        for handle in list(self._handles.values()):
            handle.cancelled = True
        self._client.cancel()

    def idle(self) -> bool:
        return not self._ended and self._client.idle()


def report(
    client: NativeClient, handles: list[NativeHandle], on_token: Callable[[int, int, float], None]
) -> None:
    """Step until all are finished, telling every token as it comes."""
    written = [0] * len(handles)
    unfinished = dict(enumerate(handles))
    while unfinished:
        finished = set(client.step())
        for index, handle in list(unfinished.items()):
            tokens, logprobs = handle.sequence.read(written[index])
            for token, logprob in zip(tokens, logprobs, strict=True):
                on_token(index, token, logprob)
            written[index] += len(tokens)
            if handle in finished:
                del unfinished[index]


def stream(
    client: NativeClient, handle: NativeHandle, text: TextStream
) -> Iterator[tuple[int, str, float]]:
    """(token, text it adds, log-probability) as they come; see `NativeModel.stream`."""
    waiting: list[tuple[int, float]] = []  # tokens whose text is not certain yet
    written = 0
    with client:
        finished = False
        while not finished:
            finished = bool(client.step())
            tokens, logprobs = handle.sequence.read(written)
            written += len(tokens)
            last = len(tokens) - 1
            for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                waiting.append((token, logprob))
                if finished and i == last:
                    break
                delta = text.push(token)
                if delta is not None:
                    yield from _spread(waiting, delta)
                    waiting = []
        completion = handle.completion()
        if waiting:
            # A block of reasoning that is closed twice ends later than it seemed to.
            known = completion.text.startswith(text.sent)
            yield from _spread(waiting, completion.text[len(text.sent) :] if known else "")


def prompt_end(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """What a prompt ends with, as far as it can open a block of reasoning. Rows of a soft prompt
    have no text."""
    words = [token for token in tokens[-OPENING_TOKENS:] if token >= 0]
    return tokenizer.decode(words, skip_special=False)


def of_prompt(index: int, error: Exception) -> Exception:
    """The same error, which names the prompt."""
    return type(error)(f"prompt {index}: {error}")


def completion_or_error(index: int, place: NativeHandle | Exception) -> Completion | Exception:
    """The completion of a request of the prompt, or the error that it met."""
    if isinstance(place, Exception):
        return of_prompt(index, place)
    try:
        return place.completion()
    except native.NumericError as error:
        return of_prompt(index, error)


def _spread(waiting: list[tuple[int, float]], text: str) -> Iterator[tuple[int, str, float]]:
    """The tokens with their common text on the last, which made it certain."""
    for i, (token, logprob) in enumerate(waiting):
        yield token, text if i == len(waiting) - 1 else "", logprob
