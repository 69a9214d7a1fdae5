"""Requests on one model run together: no answer is mixed up with another, and none waits for a stream nobody reads.

Whatever would wait for ever fails here after TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError, EdgeError, LogitsError
from edge_runtime.text.stream import AHEAD, TextStream
from tests.runtime.fakes import blended_table, make_engine, make_llm, random_table

TIMEOUT_S = 20.0
TARGET = random_table(24, 1)
DRAFT = blended_table(TARGET, random_table(24, 2), 0.4)
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "num_draft_tokens": 4}
PROMPTS = ("abcab", "abcx", "qrstuvqrst", "x")


@pytest.fixture
def llm(tmp_path) -> EdgeLLM:
    return make_llm(tmp_path, make_engine(TARGET, DRAFT, chunk_size=4))


@pytest.fixture
def answers(tmp_path_factory) -> dict[str, str]:
    """What each prompt's answer is on a model of its own."""
    return {prompt: fresh_answer(tmp_path_factory.mktemp("fresh"), prompt) for prompt in PROMPTS}


def fresh_answer(folder, prompt: str) -> str:
    return make_llm(folder, make_engine(TARGET, DRAFT)).generate(prompt, **OPTIONS).text


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start work in a thread; the function returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(TIMEOUT_S)
        assert results, "it waits for ever"
        return results[0]

    return result


def read(stream: TextStream, count: int) -> str:
    """Read some chunks of a stream."""
    return "".join(next(stream).text for _ in range(count))


def test_two_threads_get_what_they_get_alone(llm, answers):
    def work(prompt: str) -> Callable[[], list[str]]:
        return lambda: [llm.generate(prompt, **OPTIONS).text for _ in range(10)]

    results = {prompt: in_thread(work(prompt)) for prompt in PROMPTS}
    for prompt, result in results.items():
        assert result() == [answers[prompt]] * 10


def test_half_read_stream_does_not_block_its_own_thread(llm, answers):
    """A lock was held between tokens: the next request of the same thread waited for ever."""
    first, second, *_ = PROMPTS
    stream = llm.stream(first, **OPTIONS)
    begun = read(stream, 3)
    assert unblocked(lambda: llm.generate(second, **OPTIONS).text, stream) == answers[second]
    assert begun + "".join(chunk.text for chunk in stream) == answers[first]


def unblocked(work: Callable[[], str], stream: TextStream) -> str:
    """Run work in this thread; close the stream from another if it blocks, so that the test fails and does not hang."""
    timer = threading.Timer(TIMEOUT_S, stream.close)
    timer.start()
    result = work()
    assert timer.is_alive(), "it waits for ever"
    timer.cancel()
    return result


@pytest.mark.parametrize("logprobs", [None, 2])
def test_interleaved_streams_each_get_their_own_answer(llm, answers, logprobs):
    """Each has a sequence of its own; its block's logits must not be another's."""
    streams = {prompt: llm.stream(prompt, **OPTIONS, logprobs=logprobs) for prompt in PROMPTS}
    texts = dict.fromkeys(PROMPTS, "")
    while streams:
        for prompt, stream in list(streams.items()):
            chunk = next(stream, None)
            if chunk is None:
                del streams[prompt]
            else:
                texts[prompt] += chunk.text
    assert texts == answers


def test_interleaved_logprobs_are_those_of_an_undisturbed_stream(llm, tmp_path_factory):
    wanted = make_llm(tmp_path_factory.mktemp("x"), make_engine(TARGET, DRAFT)).generate("abcab", logprobs=1, **OPTIONS)
    stream = llm.stream("abcab", logprobs=1, **OPTIONS)
    for _ in stream:
        llm.generate("qrs", max_new_tokens=3)
    assert [token.logprob for token in stream.result.logprobs] == [token.logprob for token in wanted.logprobs]


def test_interleaved_drafts_each_have_their_own_sequence(tmp_path):
    """Otherwise one drafts for another request's text: nothing wrong is emitted, but nothing is accepted either."""
    llm = make_llm(tmp_path, make_engine(TARGET, TARGET))
    stream = llm.stream("abcab", **OPTIONS)
    for _ in stream:
        llm.generate("qrstuvwxqrstuvwx", max_new_tokens=6, num_draft_tokens=4)
    assert stream.result.metrics.acceptance_rate == 1.0


@pytest.mark.parametrize("collect", ["at once", "in a cycle"])
def test_dropped_stream_lets_other_threads_go_on(llm, answers, collect):
    """Nobody can close it any more: a reference from the model to it would block every other thread for ever."""

    def drop() -> bool:
        for _ in llm.stream(PROMPTS[0], **OPTIONS):
            break
        return True

    def drop_in_cycle() -> bool:
        holder: list[Any] = [llm.stream(PROMPTS[0], **OPTIONS)]
        holder.append(holder)
        next(holder[0])
        return True

    assert in_thread(drop if collect == "at once" else drop_in_cycle)()
    if collect == "in a cycle":
        gc.collect()
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]


def test_closed_stream_lets_other_threads_go_on(llm, answers):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    read(stream, 2)
    waiting = in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)
    stream.close()
    assert waiting() == answers[PROMPTS[1]]
    assert stream.result.finish_reason == "cancelled"
    assert answers[PROMPTS[0]].startswith(stream.result.text)
    assert list(stream) == []


def test_stream_may_be_read_by_one_thread_after_another(llm, answers):
    """Web servers hand a stream from worker to worker; a worker that once read it may get another request."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = in_thread(lambda: read(stream, 2))() + read(stream, 2)
    waiting = in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)
    assert begun + "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]
    assert waiting() == answers[PROMPTS[1]]


def test_cancel_from_another_thread_during_decoding(llm, answers):
    """The request ends after the current token, and what was generated stays."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = read(stream, 3)
    in_thread(lambda: stream.cancel() or True)()
    rest = "".join(chunk.text for chunk in stream)
    assert len(begun + rest) <= 4
    assert stream.result.finish_reason == "cancelled"
    assert answers[PROMPTS[0]].startswith(stream.result.text)
    assert llm.generate(PROMPTS[1], **OPTIONS).text == answers[PROMPTS[1]]


def test_cancel_from_another_thread_during_prefill(llm, tmp_path_factory):
    """It takes effect after the step that runs; the next request keeps the chunks that were read."""
    prompt = "abcdefghijklmnopqrstuvwx" * 4
    stream = llm.stream(prompt, on_prefill=lambda done, wanted: done == 8 and stream.cancel(), **OPTIONS)
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("", "cancelled")
    result = llm.generate(prompt, **OPTIONS)
    assert 8 <= result.metrics.reused_tokens <= len(prompt)
    assert result.text == fresh_answer(tmp_path_factory.mktemp("fresh"), prompt)


def test_cancel_before_the_start_generates_nothing(llm):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    stream.cancel()
    assert list(stream) == []
    assert llm.target.num_forwards == 0


def test_failing_callback_lets_other_threads_go_on(llm, answers):
    def fail(done: int, wanted: int) -> None:
        raise KeyError("progress bar")

    with pytest.raises(KeyError):
        llm.stream(PROMPTS[0], on_prefill=fail, **OPTIONS).finish()
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]


def test_unread_stream_has_not_begun(llm, answers):
    """It begins when its first chunk is asked for."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    assert stream.finish().text == answers[PROMPTS[0]]


def test_exhausted_stream_stays_exhausted(llm):
    """Even while another thread reads another one."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    result = stream.finish()
    held, asked = threading.Event(), threading.Event()
    other = llm.stream(PROMPTS[1], **OPTIONS)

    def hold() -> bool:
        next(other)
        held.set()
        return asked.wait(TIMEOUT_S)

    holding = in_thread(hold)
    assert held.wait(TIMEOUT_S)
    assert in_thread(lambda: (list(stream), stream.finish()))() == ([], result)
    asked.set()
    assert holding()


# --- nobody waits for a reader that does not read ------------------------------------------------------------------


def test_a_reader_that_fails_and_keeps_its_exception_holds_nobody(llm, answers):
    """As a `Future` does: exception, traceback, frame and half-read stream lived on, and all others waited for ever."""
    kept = []

    def fail() -> bool:
        try:
            for _ in llm.stream(PROMPTS[0], **OPTIONS):
                raise ValueError("the reader's own")
        except ValueError as error:
            kept.append(error)
        return True

    assert in_thread(fail)()
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    assert kept


def test_a_with_statement_closes_the_stream_however_its_reader_leaves(llm, answers):
    with pytest.raises(ValueError, match="the reader's own"), llm.stream(PROMPTS[0], **OPTIONS) as stream:
        next(stream)
        raise ValueError("the reader's own")
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]


def test_a_slow_reader_holds_nobody_and_still_gets_its_text(llm, answers):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = read(stream, 3)
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    begun += read(stream, 3)
    assert in_thread(lambda: llm.generate(PROMPTS[2], **OPTIONS).text)() == answers[PROMPTS[2]]
    assert begun + "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.perf_counter() + TIMEOUT_S
    while not is_so():
        assert time.perf_counter() < end, "it never comes"
        time.sleep(0.001)


# --- any thread, at any time ----------------------------------------------------------------------------------------


class Held:
    """Holds a model in the middle of its next forward, and counts how many are in one at once."""

    def __init__(self, llm: EdgeLLM) -> None:
        self.is_in, self.may_go = threading.Event(), threading.Event()
        self.most = self._now = 0
        llm.target.on_forward = self._forward

    def _forward(self, token_ids: list[int]) -> None:
        self._now += 1
        self.most = max(self.most, self._now)
        self.is_in.set()
        assert self.may_go.wait(TIMEOUT_S)
        self._now -= 1


@pytest.mark.parametrize("end", [TextStream.close, TextStream.cancel])
def test_a_stream_ended_by_another_thread_in_the_middle_of_a_step_harms_nobody(llm, answers, end):
    """A turn was given away under it: "Infer Request is busy" for others, "generator already executing" for this."""
    stream, held = llm.stream(PROMPTS[0], **OPTIONS), Held(llm)
    text = in_thread(lambda: "".join(chunk.text for chunk in stream))
    assert held.is_in.wait(TIMEOUT_S)
    end(stream)
    others = [in_thread(lambda p=prompt: llm.generate(p, **OPTIONS).text) for prompt in PROMPTS[1:]]
    held.may_go.set()
    assert text() == stream.result.text
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) <= 1
    assert [other() for other in others] == [answers[prompt] for prompt in PROMPTS[1:]]
    assert held.most == 1


def test_a_second_reader_is_refused_and_harms_nobody(llm, answers):
    stream, held = llm.stream(PROMPTS[0], **OPTIONS), Held(llm)
    text = in_thread(lambda: "".join(chunk.text for chunk in stream))
    assert held.is_in.wait(TIMEOUT_S)
    for _ in range(3):
        with pytest.raises(ConfigError, match="asked for a chunk while it computes one"):
            next(stream)
    held.may_go.set()
    assert text() == answers[PROMPTS[0]]
    assert llm.generate(PROMPTS[1], **OPTIONS).text == answers[PROMPTS[1]]


def test_a_reader_within_its_own_callback_is_refused(llm, answers):
    refused = []

    def nested(done: int, wanted: int) -> None:
        with pytest.raises(ConfigError, match="asked for a chunk while it computes one") as caught:
            next(stream)
        refused.append(caught.value)

    stream = llm.stream(PROMPTS[0], on_prefill=nested, **OPTIONS)
    assert stream.finish().text == answers[PROMPTS[0]]
    assert refused


def test_a_request_that_waits_can_be_cancelled(tmp_path):
    """On a model that takes one sequence at a time, as the NPU does."""
    llm = make_llm(tmp_path, make_engine(TARGET, DRAFT, max_sequences=1))
    stream, held = llm.stream(PROMPTS[0], **OPTIONS), Held(llm)
    computing = in_thread(stream.finish)
    assert held.is_in.wait(TIMEOUT_S)
    other = llm.stream(PROMPTS[1], **OPTIONS)
    waiting = in_thread(other.finish)
    other.cancel()
    assert (waiting().token_ids, other.result.finish_reason) == ([], "cancelled")
    held.may_go.set()
    assert computing().finish_reason == "length"


def test_closing_and_reading_at_once_never_fails(llm, answers):
    """Forty rounds of readers, closers and a third who asks: who asks is answered, none sees an error but ours."""
    for _ in range(40):
        stream = llm.stream(PROMPTS[0], **OPTIONS)
        readers = [in_thread(lambda s=stream: read_or_be_refused(s)) for _ in range(2)]
        closer = in_thread(lambda s=stream: s.close() or True)
        assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
        assert [reader() for reader in readers] == [True, True]
        assert closer()
        assert answers[PROMPTS[0]].startswith(stream.result.text)


def read_or_be_refused(stream: TextStream) -> bool:
    while True:
        try:
            return all(chunk.text is not None for chunk in stream)
        except ConfigError as error:
            assert "asked for a chunk" in str(error)


def test_warming_up_disturbs_no_request(llm, answers):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = read(stream, 3)
    llm.warm_up()
    assert begun + "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]


# --- readers at any pace --------------------------------------------------------------------------------------------


def num_engine_threads() -> int:
    return sum(thread.name == "edge-run engine" for thread in threading.enumerate())


def test_a_reader_that_stops_reading_is_written_ahead_a_little_and_no_thread_stays(llm):
    stream = llm.stream(PROMPTS[0], max_new_tokens=400, num_draft_tokens=0)
    read(stream, 2)
    wait_until(lambda: num_engine_threads() == 0)
    assert llm.target.num_forwards <= 2 + AHEAD + 1
    assert stream.finish().metrics.new_tokens == 400
    wait_until(lambda: num_engine_threads() == 0)


def test_what_was_written_ahead_and_not_read_is_no_part_of_a_cancelled_result(llm):
    stream = llm.stream(PROMPTS[0], max_new_tokens=400, num_draft_tokens=0)
    text = read(stream, 2)
    wait_until(lambda: num_engine_threads() == 0)
    stream.cancel()
    assert list(stream) == []
    result = stream.result
    assert (result.text, len(result.token_ids), result.metrics.new_tokens) == (text, 2, 2)
    assert result.finish_reason == "cancelled"


def test_a_reader_that_sleeps_costs_others_no_step(llm, answers):
    """Nor do sixteen, which are as many as the model steps at once: their places go to who reads."""
    stopped = [llm.stream(PROMPTS[0], max_new_tokens=400) for _ in range(20)]
    for stream in stopped:
        read(stream, 1)
    for prompt in PROMPTS:
        assert in_thread(lambda p=prompt: llm.generate(p, **OPTIONS).text)() == answers[prompt]
    wanted = llm.generate(PROMPTS[0], max_new_tokens=400).text
    assert {stream.finish().text for stream in stopped} == {wanted}


def test_a_request_from_within_another_ones_stream_or_callback_runs(llm, answers):
    texts = []
    stream = llm.stream(
        PROMPTS[0], on_prefill=lambda done, wanted: texts.append(llm.generate(PROMPTS[1], **OPTIONS).text), **OPTIONS
    )
    text = ""
    for chunk in stream:
        text += chunk.text
        if len(texts) < 6:
            texts.append(llm.generate(PROMPTS[2], **OPTIONS).text)
    assert text == answers[PROMPTS[0]]
    assert texts == [answers[PROMPTS[1]]] * 2 + [answers[PROMPTS[2]]] * 4


def test_an_interrupted_reader_ends_its_own_request_only(llm, answers):
    """Ctrl-C comes in the reader's thread, be it in its own code, in a callback or while it waits."""

    def interrupt(done: int, wanted: int) -> None:
        raise KeyboardInterrupt

    other = in_thread(lambda: [llm.generate(PROMPTS[1], **OPTIONS).text for _ in range(5)])
    for _ in range(5):
        stream = llm.stream(PROMPTS[0], on_prefill=interrupt, **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert list(stream) == []
    assert other() == [answers[PROMPTS[1]]] * 5
    wait_until(lambda: num_engine_threads() == 0)
    assert not llm.target.open_sequences


def test_an_error_of_one_request_is_its_own(llm, answers):
    other = in_thread(lambda: [llm.generate(PROMPTS[1], **OPTIONS).text for _ in range(5)])
    for _ in range(5):
        with pytest.raises(LogitsError, match="forbid every token"):
            llm.generate(PROMPTS[0], logit_bias=dict.fromkeys(range(24), float("-inf")))
    assert other() == [answers[PROMPTS[1]]] * 5


def test_a_failing_forward_reaches_every_reader_and_the_next_request_runs(llm, answers):
    def fail(token_ids: list[int]) -> None:
        raise RuntimeError("device lost")

    llm.target.on_forward = fail
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate(PROMPTS[0])
    llm.target.on_forward = lambda token_ids: None
    assert llm.generate(PROMPTS[1], **OPTIONS).text == answers[PROMPTS[1]]


# --- many prompts, asyncio, the end ---------------------------------------------------------------------------------


def test_many_prompts_are_answered_at_the_same_time_each_as_alone(llm, answers):
    results = llm.generate_many(PROMPTS, **OPTIONS)
    assert [result.text for result in results] == list(answers.values())
    assert llm.target.most_spans == len(PROMPTS)


def test_several_answers_to_a_prompt_have_seeds_of_their_own(llm):
    options = {"temperature": 1.0, "max_new_tokens": 12}
    results = llm.generate_many(["abcab", "x"], n=3, seed=5, **options)
    wanted = [llm.generate(p, seed=seed, **options).text for p in ("abcab", "x") for seed in (5, 6, 7)]
    assert [result.text for result in results] == wanted
    assert len(set(wanted)) > 3


def test_a_prompt_that_many_share_is_read_once(llm):
    prompt = "abcdefghijklmnopqrstuvwx" * 3
    lengths: list[int] = []
    llm.target.on_forward = lambda ids: lengths.append(len(ids))
    results = llm.generate_many([prompt], n=4, seed=1, temperature=1.0, max_new_tokens=2, num_draft_tokens=0)
    assert sum(lengths) <= len(prompt) + 4 * 34
    assert [result.metrics.reused_tokens for result in results][1:] != [0, 0, 0]


def test_each_of_many_prompts_may_have_its_own_options(llm):
    configs = [GenerationConfig(max_new_tokens=n) for n in (2, 5)]
    assert [len(r.token_ids) for r in llm.generate_many(["abc", "abc"], configs)] == [2, 5]
    with pytest.raises(ConfigError, match="options of 1 prompts, expected 2"):
        llm.generate_many(["a", "b"], configs[:1])
    with pytest.raises(ConfigError, match="n is 0"):
        llm.generate_many(["a"], n=0)
    with pytest.raises(ConfigError, match="expected a list of prompts"):
        llm.generate_many("abc")


def test_one_of_many_that_fails_ends_the_others(llm):
    with pytest.raises(LogitsError):
        llm.generate_many(
            ["abc", "x"],
            [GenerationConfig(max_new_tokens=400), GenerationConfig(logit_bias=dict.fromkeys(range(24), -np.inf))],
        )
    wait_until(lambda: num_engine_threads() == 0)
    assert not llm.target.open_sequences


def test_async_streams_run_together_and_leave_other_tasks_time(llm, answers):
    async def read_all(prompt: str) -> str:
        return "".join([chunk.text async for chunk in llm.astream(prompt, **OPTIONS)])

    async def chat(prompt: str) -> str:
        return (await llm.achat(prompt, **OPTIONS)).text

    async def main() -> list[str]:
        return await asyncio.gather(*map(read_all, PROMPTS), *map(chat, PROMPTS), llm.agenerate("x", **OPTIONS))

    *texts, last = asyncio.run(main())
    assert texts == [*answers.values()] * 2
    assert last.text == answers["x"]


def test_a_cancelled_task_ends_its_request(llm):
    async def main() -> None:
        task = asyncio.create_task(llm.agenerate(PROMPTS[0], max_new_tokens=500))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: num_engine_threads() == 0 and not llm.target.open_sequences)


def test_a_closed_model_refuses_requests_and_ends_those_it_has(llm):
    with llm:
        stream = llm.stream(PROMPTS[0], max_new_tokens=400)
        read(stream, 2)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    with pytest.raises(EdgeError, match="the model was closed"):
        llm.generate(PROMPTS[0])
    assert num_engine_threads() == 0
    llm.close()
    with pytest.raises(EdgeError, match="the model was closed"):
        llm.report()
