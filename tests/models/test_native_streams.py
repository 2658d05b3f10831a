"""Completions as they come: stop strings, streams, cancelling, deadlines and many callers."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from alignpro.models.completion_text import TextStream
from alignpro.models.native_model import NativeModel
from alignpro.types import SamplingParams
from native_runs import ENDLESS, SHORT, assert_settles, drain

# --- stop strings and streams ---


def free_text(model: NativeModel, params: SamplingParams) -> str:
    return model.generate(["hello"], params)[0].text


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_stop_string_cuts_the_text(tiny: NativeModel, width: int) -> None:
    whole = free_text(tiny, ENDLESS)
    stop = whole[30 : 30 + width]
    (got,) = tiny.generate(["hello"], replace(ENDLESS, stop=("\x00never", stop)))
    assert got.finish_reason == "stop"
    assert got.text == whole[: whole.index(stop)]
    assert len(got.tokens) < 60


def test_a_stop_string_before_min_new_tokens_does_not_count(tiny: NativeModel) -> None:
    whole = tiny.generate(["hello"], ENDLESS)[0]
    stop = whole.text[10]
    params = replace(ENDLESS, stop=(stop,), min_new_tokens=60)
    got = tiny.generate(["hello"], params)[0]
    assert len(got.tokens) >= 60
    least = tiny.tokenizer.decode(got.tokens[:59])
    assert stop in least and got.text.startswith(least[:50])


def test_a_stop_id_is_not_in_the_text(tiny: NativeModel) -> None:
    whole = tiny.generate(["hello"], ENDLESS)[0]
    stop = whole.tokens[20]
    (got,) = tiny.generate(["hello"], replace(ENDLESS, stop_token_ids=(stop,)))
    assert got.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert got.text == tiny.tokenizer.decode(got.tokens[:-1])
    assert got.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stop", [(), ("e",), ("he", "the t"), ("\x00",)])
def test_a_stream_is_the_completion(tiny: NativeModel, seed: int, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_new_tokens=60, seed=seed, stop=stop, temperature=1.5)
    (whole,) = tiny.generate(["hello"], params)
    pieces = list(tiny.stream("hello", params))
    assert [token for token, _, _ in pieces] == whole.tokens
    assert [logprob for _, _, logprob in pieces] == whole.logprobs
    assert "".join(text for _, text, _ in pieces) == whole.text


def test_a_stream_holds_half_characters_back(smollm2: NativeModel) -> None:
    text = "🙂 日本語 👩‍👩‍👧 한국어 naïve"
    tokens = smollm2.tokenizer.encode(text)
    stream = TextStream(smollm2.tokenizer, stops=("ve!",))
    pieces = [stream.push(token) for token in tokens]
    assert pieces.count(None) > 5  # characters of several tokens
    assert not any("�" in piece for piece in pieces if piece)
    assert pieces[-1] is None  # it ends in "ve", which may become the stop string
    assert "".join(piece for piece in pieces if piece) == stream.sent
    assert stream.sent + "ïve" == text  # the last token's text waits as a whole


def test_closing_a_stream_cancels_it(tiny: NativeModel) -> None:
    stream = tiny.stream("hello", ENDLESS)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_settles(tiny, steps=1)


def test_dropping_a_stream_cancels_it(tiny: NativeModel) -> None:
    stream = tiny.stream("hello", ENDLESS)
    del stream
    gc.collect()
    assert_settles(tiny, steps=1)


def test_a_stream_raises_on_the_call(tiny: NativeModel) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        tiny.stream([], SHORT)
    with pytest.raises(ValueError, match="n: stream"):
        tiny.stream("hello", replace(SHORT, n=2))


# --- ends ---


def test_on_token_sees_every_token(tiny: NativeModel) -> None:
    seen: dict[int, list[tuple[int, float]]] = {}
    params = replace(SHORT, n=2, stop=("e",))

    def on_token(index: int, token: int, logprob: float) -> None:
        seen.setdefault(index, []).append((token, logprob))

    got = tiny.generate(["hello", "there"], params, on_token=on_token)
    assert [seen[i] for i in range(4)] == [
        list(zip(c.tokens, c.logprobs, strict=True)) for c in got
    ]
    assert got == tiny.generate(["hello", "there"], params)


def test_an_exception_in_on_token_cancels_everything(tiny: NativeModel) -> None:
    class Enough(Exception):
        pass

    def on_token(index: int, token: int, logprob: float) -> None:
        raise Enough

    with pytest.raises(Enough):
        tiny.generate(["hello"] * 3, ENDLESS, on_token=on_token)
    assert_settles(tiny, steps=1)


@pytest.mark.parametrize("reporting", [False, True])
def test_an_interrupt_cancels_everything(smollm2: NativeModel, reporting: bool) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            smollm2.generate(
                ["Tell me a story."] * 4,
                SamplingParams(max_new_tokens=4000, ignore_eos=True),
                on_token=(lambda *_: None) if reporting else None,
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - started < 20
    assert_settles(smollm2, steps=1)


def test_a_deadline_returns_what_there_is(smollm2: NativeModel) -> None:
    params = SamplingParams(
        max_new_tokens=8000, ignore_eos=True, deadline_seconds=0.5, temperature=0.0
    )
    (got,) = smollm2.generate(["Tell me a story."], params)
    assert got.finish_reason == "deadline"
    assert len(got.tokens) == len(got.logprobs) < 8000
    (ended,) = smollm2.generate(["Tell me a story."], replace(params, deadline_seconds=1e-9))
    assert (ended.tokens, ended.finish_reason) == ([], "deadline")


def test_cancelling_a_handle(tiny: NativeModel) -> None:
    client = tiny.client()
    handle = client.submit([1, 5, 6], ENDLESS)
    other = client.submit([1, 5, 6], SHORT)
    with pytest.raises(RuntimeError, match="not finished"):
        handle.completion()
    client.step()
    client.step()
    handle.cancel()
    assert set(drain(client)) == {handle, other}
    assert handle.completion().finish_reason == "cancelled"
    assert 1 <= len(handle.completion().tokens) < 5
    assert other.completion().finish_reason == "length"


# --- many callers ---


def test_many_threads_get_what_they_would_get_alone(tiny: NativeModel) -> None:
    prompts = [f"hello {i}" for i in range(16)]
    alone = [tiny.generate([p], replace(SHORT, seed=i)) for i, p in enumerate(prompts)]
    together: list[Any] = [None] * 16

    def work(i: int) -> None:
        together[i] = tiny.generate([prompts[i]], replace(SHORT, seed=i))

    run_threads([lambda i=i: work(i) for i in range(16)])
    assert together == alone


def test_threads_that_step_get_back_their_own(tiny: NativeModel) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        client = tiny.client()
        mine = {client.submit([1, 5, 6], replace(SHORT, seed=seed), sample=s) for s in range(5)}
        got: list[Any] = []
        while not client.idle():
            got += client.step()
        if len(got) != 5 or set(got) != mine:
            failures.append(f"{seed}: {len(got)}")

    run_threads([lambda i=i: work(i) for i in range(6)])
    assert not failures
    assert tiny.client().idle() and tiny.client().step() == []


def test_generating_lets_other_threads_run(smollm2: NativeModel) -> None:
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    smollm2.generate(["Count to ten."], SamplingParams(max_new_tokens=16, ignore_eos=True))
    stop.set()
    thread.join()
    assert ticks > 20


def run_threads(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
