"""A prompter among threads, event loops and deadlines: nothing waits, leaks or fails others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import alignpro
from alignpro.config import REWRITE
from alignpro.models.adapter import save_peft
from alignpro.models.engine_thread import ClosedError, EngineThread
from alignpro.models.native_model import load_model
from alignpro.rewriting import Clock, Request, Turn
from alignpro.types import Completion
from native_runs import ENDLESS, SHORT, assert_settles, lora

PROMPTING = alignpro.Prompting(template="{prompt}", separator=" | ")
PARAMS = replace(REWRITE, max_new_tokens=6, ignore_eos=True)
LONG = replace(PARAMS, max_new_tokens=240)  # nearly all of the context: tens of steps
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the heron"}]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


@pytest.fixture
def prompter(model):
    with alignpro.Prompter(model, prompting=PROMPTING, params=PARAMS) as made:
        yield made


def slow_steps(monkeypatch, seconds):
    """Every step of a native client takes so long."""
    from alignpro.models.native_client import NativeClient

    step = NativeClient.step

    def slower(self):
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(NativeClient, "step", slower)


def test_past_the_deadline_the_prompt_goes_out_as_it_is(model, monkeypatch):
    slow_steps(monkeypatch, 0.02)
    with alignpro.Prompter(model, prompting=PROMPTING, params=LONG) as prompter:
        begin = time.perf_counter()
        result = prompter.rewrite(CHAT, deadline=0.1)
        took = time.perf_counter() - begin
        assert (result.applied, result.reason, result.text) == (False, "deadline", "")
        assert result.prompt == CHAT and 90 < result.milliseconds < 1000 and took < 1.0
        time.sleep(0.1)  # the step after is the one that retires it
        assert_settles(model)
        late = asyncio.run(prompter.arewrite("the heron", deadline=0.1))
        assert (late.prompt, late.reason) == ("the heron", "deadline")


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), "1", True])
def test_a_deadline_is_checked(prompter, deadline):
    with pytest.raises(ValueError, match="deadline: expected seconds, or None"):
        prompter.rewrite("the heron", deadline=deadline)


def test_a_deadline_in_a_thousand_years_is_one(prompter):
    assert prompter.rewrite("the heron", deadline=1e12).applied
    assert asyncio.run(prompter.arewrite("the heron", deadline=1e12)).applied
    with prompter.stream("the heron", deadline=1e12) as pieces:
        assert list(pieces) and pieces.result.applied


@pytest.mark.parametrize("seed", [1.5, "1"])
def test_a_seed_is_checked(prompter, seed):
    with pytest.raises(ValueError, match="seed: expected an integer, or None, got"):
        prompter.rewrite("the heron", seed=seed)


@pytest.mark.parametrize("deadline", [0, -1.5])
def test_a_budget_that_is_spent_leaves_the_prompt_as_it_is(prompter, deadline):
    late = prompter.rewrite("the heron", deadline=deadline)
    assert (late.prompt, late.applied, late.reason) == ("the heron", False, "deadline")
    late = asyncio.run(prompter.arewrite("the heron", deadline=deadline))
    assert (late.prompt, late.reason) == ("the heron", "deadline")
    with prompter.stream("the heron", deadline=deadline) as pieces:
        assert "".join(pieces) == "the heron"
    assert (pieces.result.prompt, pieces.result.reason) == ("the heron", "deadline")


def test_threads_and_event_loops_get_what_one_caller_gets(prompter):
    prompts = [f"bird {number}" for number in range(24)]
    alone = [prompter.rewrite(prompt, seed=7).text for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        threads = list(pool.map(lambda prompt: prompter.rewrite(prompt, seed=7).text, prompts))

    async def together():
        return await asyncio.gather(*(prompter.arewrite(prompt, seed=7) for prompt in prompts))

    assert alone == threads == [result.text for result in asyncio.run(together())]
    assert len(set(alone)) > 1


def test_requests_of_threads_share_steps(model, prompter):
    def steps(work):
        before = model.stats()["steps"]
        work()
        return model.stats()["steps"] - before

    prompts = [f"bird {number}" for number in range(16)]
    one_by_one = steps(lambda: [prompter.rewrite(prompt) for prompt in prompts])
    barrier = threading.Barrier(16)

    def one(prompt):
        barrier.wait()
        return prompter.rewrite(prompt)

    with ThreadPoolExecutor(16) as pool:
        at_once = steps(lambda: list(pool.map(one, prompts)))
    assert at_once < one_by_one / 2


def test_cancelling_a_task_ends_its_request(model, monkeypatch):
    slow_steps(monkeypatch, 0.01)
    with alignpro.Prompter(model, prompting=PROMPTING, params=LONG) as prompter:

        async def leave():
            task = asyncio.create_task(prompter.arewrite("the heron"))
            await asyncio.sleep(0.1)
            assert model.stats()["kv_blocks_in_use"] > 0
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(leave())
        time.sleep(0.1)
        assert_settles(model)


def test_bad_input_is_the_callers_and_costs_no_other(prompter):
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(prompter.rewrite, f"bird {number}") for number in range(8)]
        with pytest.raises(ValueError, match="exceed the context"):
            prompter.rewrite("long " * 400)
        with pytest.raises(ValueError, match="ends in a user turn"):
            asyncio.run(prompter.arewrite([{"role": "assistant", "content": "no"}]))
        assert all(future.result().text for future in good)
    assert prompter.rewrite_batch([]) == []


def test_an_engine_that_fails_lets_the_prompt_out_and_goes_on(prompter, monkeypatch, caplog):
    from alignpro.models.native_client import NativeClient

    step, failures = NativeClient.step, iter([MemoryError("no memory")])

    def failing(self):
        for error in failures:
            raise error
        return step(self)

    monkeypatch.setattr(NativeClient, "step", failing)
    result = prompter.rewrite("the heron")
    assert (result.prompt, result.reason) == ("the heron", "error")
    assert "no memory" in caplog.text
    assert prompter.rewrite("the heron").applied


def test_a_closed_prompter_says_so(model):
    prompter = alignpro.Prompter(model, prompting=PROMPTING, params=LONG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prompter.rewrite, "the heron")
        time.sleep(0.005)
        prompter.close()
        outcome = waiting.exception()
        assert outcome is None or isinstance(outcome, ClosedError)  # it may have ended before
    prompter.close()
    for late, *arguments in (
        (prompter.rewrite, "the heron"),
        (prompter.rewrite_batch, []),
        (prompter.rewrites, ["the heron"]),
        (prompter.reload,),
    ):
        with pytest.raises(ClosedError, match="was closed"):
            late(*arguments)
    assert_settles(model)
    del prompter
    before = threading.active_count()
    alignpro.Prompter(model, prompting=PROMPTING, params=LONG)  # dropped
    assert threading.active_count() == before


def test_nothing_of_a_prompter_is_left_for_the_interpreters_end(model):
    closed, dropped = EngineThread(model), EngineThread(model)
    entries = [weakref.ref(one._end.peek()[2][-1]) for one in (closed, dropped)]
    assert all(entry() is not None for entry in entries)
    closed.close()
    del dropped
    assert all(entry() is None for entry in entries)


def test_a_new_adapter_is_used_from_then_on(model, tmp_path):
    options = {"prompting": PROMPTING, "params": PARAMS}

    def save(seed):
        save_peft(tmp_path / "adapter", lora(model, seed))

    save(1)
    with alignpro.Prompter(model, tmp_path / "adapter", **options) as prompter:
        first = prompter.rewrite("the heron", seed=3).text
        save(2)
        assert prompter.rewrite("the heron", seed=3).text == first
        prompter.reload()
        second = prompter.rewrite("the heron", seed=3).text
        with alignpro.Prompter(model, lora(model, 2), **options) as fresh:
            assert second == fresh.rewrite("the heron", seed=3).text != first
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half a file")
        with pytest.raises(ValueError):
            prompter.reload()
        assert prompter.rewrite("the heron", seed=3).text == second


@pytest.mark.parametrize("mode", ["append", "rewrite"])
@pytest.mark.parametrize("prompt", ["the heron", CHAT])
def test_a_stream_is_the_rewrite_in_pieces(model, mode, prompt):
    prompting = replace(PROMPTING, mode=mode)
    with alignpro.Prompter(model, prompting=prompting, params=LONG) as prompter:
        for seed in range(3):
            whole = prompter.rewrite(prompt, seed=seed)
            stream = prompter.stream(prompt, seed=seed)
            pieces = list(stream)
            assert "".join(pieces) == whole.messages[-1]["content"] and len(pieces) > 3
            assert all(pieces) and (mode == "rewrite" or pieces[0] == "the heron")
            assert replace(stream.result, milliseconds=0) == replace(whole, milliseconds=0)

            async def together(seed=seed):
                stream = await prompter.astream(prompt, seed=seed)
                return [piece async for piece in stream], stream.result

            again, result = asyncio.run(together())
            assert "".join(again) == "".join(pieces) and result.applied
    assert_settles(model)


def test_spaces_around_a_rewrite_are_none_of_its_pieces(prompter):
    for mode, written, expected in (
        ("append", [" ", "\n a", " b ", " \n"], ["bird", " | a", " b"]),
        ("rewrite", [" ", "\n a", " b ", " \n"], ["a", " b"]),
        ("append", [" ", "\n"], ["bird"]),
        ("rewrite", [" ", "\n"], ["bird"]),
    ):
        pipeline = alignpro.Pipeline(
            prompter.model, None, None, prompting=replace(PROMPTING, mode=mode)
        )
        request = Request("bird", "bird", 0, pipeline, [], PARAMS)
        text = "".join(written)
        request.future.set_result(Completion([1], text, [0.0], [1.0], "stop", [1]))
        turn = Turn(request, Clock(None), None)
        pieces = [turn.push(""), *map(turn.push, written), turn.end()]
        assert [piece for piece in pieces if piece] == expected
        assert turn.result.messages[-1]["content"] == "".join(expected)


def test_a_stream_ends_at_its_deadline_with_the_original(model, monkeypatch):
    slow_steps(monkeypatch, 0.02)
    for mode in ("append", "rewrite"):
        options = {"prompting": replace(PROMPTING, mode=mode), "params": LONG}
        with alignpro.Prompter(model, **options) as prompter:
            begin = time.perf_counter()
            stream = prompter.stream(CHAT, deadline=0.2)
            pieces = list(stream)
            assert 0.19 < time.perf_counter() - begin < 1.0
            assert (stream.result.applied, stream.result.reason) == (False, "deadline")
            assert stream.result.prompt == CHAT and len(pieces) > 2  # some of it was given
            assert next(stream, None) is None

            async def late(prompter=prompter):
                monkeypatch.setattr(prompter, "_prepare", lambda *_: time.sleep(0.3))
                async with await prompter.astream("the heron", deadline=0.1) as stream:
                    return [piece async for piece in stream], stream.result

            pieces, result = asyncio.run(late())
            assert (pieces, result.prompt, result.reason) == (
                ["the heron"],
                "the heron",
                "deadline",
            )
    time.sleep(0.1)
    assert_settles(model)


def test_a_reader_that_is_late_for_a_rewrite_that_was_not_gets_all_of_it(prompter):
    stream = prompter.stream("the heron", deadline=5.0, seed=1)
    first = next(stream)
    time.sleep(0.5)
    stream._turn._clock._begin -= 10  # the deadline is past
    assert first + "".join(stream) == prompter.rewrite("the heron", seed=1).prompt
    assert stream.result.applied


def test_a_guard_speaks_at_the_end_of_a_stream(model):
    guards = alignpro.GuardConfig(max_growth=0.5, free_characters=0)
    with alignpro.Prompter(model, prompting=PROMPTING, params=PARAMS, guards=guards) as prompter:
        stream = prompter.stream("the heron", seed=1)
        assert "".join(stream).startswith("the heron | ")
        assert (stream.result.reason, stream.result.prompt) == ("guard_length", "the heron")


def test_leaving_a_stream_ends_its_request(model, monkeypatch):
    slow_steps(monkeypatch, 0.01)
    with alignpro.Prompter(model, prompting=PROMPTING, params=LONG) as prompter:

        def settled():
            time.sleep(0.1)
            assert_settles(model)

        with prompter.stream("the heron") as stream:
            assert [next(stream), bool(next(stream))] == ["the heron", True]
            assert model.stats()["kv_blocks_in_use"] > 0
        settled()
        for _ in prompter.stream("the heron"):
            break
        settled()
        prompter.stream("the heron")  # dropped before it is read
        settled()

        async def leave():
            async def read():
                async for _ in await prompter.astream("the heron"):
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.1)
            assert model.stats()["kv_blocks_in_use"] > 0
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(leave())
        settled()


def test_what_a_stream_is_refused_is_raised(prompter):
    with pytest.raises(ValueError, match="exceed the context"):
        prompter.stream("long " * 400)
    with pytest.raises(ValueError, match="ends in a user turn"):
        asyncio.run(prompter.astream([{"role": "assistant", "content": "no"}]))
    prompter.close()
    with pytest.raises(ClosedError):
        prompter.stream("the heron")


def test_steps_are_told_and_an_error_there_ends_the_request_alone(model):
    engine = EngineThread(model)
    told = []
    tokens = model.tokenizer.encode("the heron")
    heard = engine.submit(
        tokens, SHORT, on_step=lambda handle: told.append(handle.sequence.read(0))
    )
    loud = engine.submit(tokens, ENDLESS, on_step=lambda handle: 1 / 0)
    written = heard.result(30).tokens
    assert told[-1][0] == written and len(told) > 1
    with pytest.raises(ZeroDivisionError):
        loud.result(30)
    with pytest.raises(ValueError, match="prompt"):
        engine.submit([], SHORT).result(30)
    engine.close()
    assert_settles(model)


@pytest.mark.parametrize("before", ["", "weakref.finalize(threading.Thread(), int)"])
def test_the_interpreter_ends_in_the_middle_of_rewrites(tiny_model_dir, before):
    program = f"""
        import threading, weakref
        {before}  # finalizers at exit then run behind the engine's own exit
        import alignpro
        from dataclasses import replace
        from alignpro.config import REWRITE
        long = replace(REWRITE, max_new_tokens=150, ignore_eos=True)
        prompter = alignpro.Prompter({str(tiny_model_dir("llama"))!r}, params=long, threads=1)
        def work():
            while True:
                prompter.rewrite("the heron")
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        prompter.rewrite("the heron")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Nothing is said: a daemon thread that prints as the interpreter goes takes it down.
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_refused(prompter):
    child = os.fork()
    if child == 0:
        try:
            prompter.rewrite("the heron", deadline=5.0)
        except RuntimeError as error:
            os._exit(7 if "parent process" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
