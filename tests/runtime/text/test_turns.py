"""Requests on one model take turns: no answer is mixed up with another, and none waits for a stream nobody reads.

Whatever would wait for ever fails here after TIMEOUT_S.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.errors import ConfigError
from edge_runtime.text.stream import TextStream
from edge_runtime.text.turns import IDLE_S
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
    """The lock was held between tokens: the next request of the same thread waited for ever."""
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
    """The sequence is read again when a stream goes on; its block's logits must not be another's."""
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


def test_interleaved_draft_reads_its_sequence_again_too(tmp_path):
    """Otherwise it drafts for another request's text: nothing wrong is emitted, but nothing is accepted either."""
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


def test_other_threads_wait_for_the_whole_answer(llm):
    """Taking turns token by token would read both sequences again at every token."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    read(stream, 1)
    waiting = in_thread(lambda: llm.generate(PROMPTS[2], **OPTIONS))
    forwards = llm.engine.target.model.num_forwards
    tokens = 1 + sum(chunk.token is not None for chunk in stream)
    assert tokens == OPTIONS["max_new_tokens"]
    assert llm.engine.target.model.num_forwards - forwards <= tokens
    waiting()


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
    """It takes effect before the next chunk; the next request keeps the chunks that were read."""
    prompt = "abcdefghijklmnopqrstuvwx" * 4
    stream = llm.stream(prompt, on_prefill=lambda done, wanted: done == 8 and stream.cancel(), **OPTIONS)
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("", "cancelled")
    result = llm.generate(prompt, **OPTIONS)
    assert result.metrics.reused_tokens == 12
    assert result.text == fresh_answer(tmp_path_factory.mktemp("fresh"), prompt)


def test_cancel_before_the_start_generates_nothing(llm):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    stream.cancel()
    assert list(stream) == []
    assert llm.engine.target.model.num_forwards == 0


def test_failing_callback_lets_other_threads_go_on(llm, answers):
    def fail(done: int, wanted: int) -> None:
        raise KeyError("progress bar")

    with pytest.raises(KeyError):
        llm.stream(PROMPTS[0], on_prefill=fail, **OPTIONS).finish()
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]


def test_request_from_within_a_callback_is_refused(llm, answers):
    """The outer one has computed half a prompt: to go on after another would mix them up."""
    refused = []

    def nested(done: int, wanted: int) -> None:
        with pytest.raises(ConfigError, match="from within a callback") as caught:
            llm.generate("abc")
        refused.append(caught.value)

    stream = llm.stream(PROMPTS[0], on_prefill=nested, **OPTIONS)
    assert "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]
    assert refused


def test_unread_stream_takes_no_turn(llm, answers):
    """It begins when its first chunk is asked for."""
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    assert stream.finish().text == answers[PROMPTS[0]]


def test_exhausted_stream_stays_exhausted(llm):
    """To say so needs no turn, even while another thread has it."""
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


# --- a turn is lost by who does not use it --------------------------------------------------------------------------


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
    begun = time.perf_counter()
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    assert time.perf_counter() - begun < IDLE_S


def test_a_slow_reader_gives_way_and_still_gets_its_text(llm, answers):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = read(stream, 3)
    assert in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS).text)() == answers[PROMPTS[1]]
    begun += read(stream, 3)
    assert in_thread(lambda: llm.generate(PROMPTS[2], **OPTIONS).text)() == answers[PROMPTS[2]]
    assert begun + "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]


def test_a_quick_reader_keeps_its_turn(llm):
    """Whatever others wait: its sequence is read once."""
    prompt = "abcdefghijklmnopqrstuvwx"
    stream = llm.stream(prompt, **OPTIONS)
    read(stream, 1)
    waiting = [in_thread(lambda: llm.generate(PROMPTS[1], **OPTIONS)) for _ in range(3)]
    forwards: list[int] = []
    llm.engine.target.model.on_forward = lambda ids: forwards.append(len(ids))
    for _ in stream:
        pass
    assert max(forwards[:10]) <= 1 + OPTIONS["num_draft_tokens"]
    for result in waiting:
        result()


def test_requests_are_answered_in_the_order_in_which_they_came(llm):
    """Whoever was quickest got the next turn: 99 in 100 of 8 threads waited up to 65 s where 10 s would be fair."""
    order = []
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    read(stream, 1)
    results = []
    for number in range(8):
        results.append(in_thread(lambda n=number: (llm.generate(PROMPTS[1], max_new_tokens=2), order.append(n))))
        wait_until(lambda n=number: len(llm.turns._waiting) == n + 1)
    stream.close()
    for result in results:
        result()
    assert order == list(range(8))


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
        llm.engine.target.model.on_forward = self._forward

    def _forward(self, token_ids: list[int]) -> None:
        self._now += 1
        self.most = max(self.most, self._now)
        self.is_in.set()
        assert self.may_go.wait(TIMEOUT_S)
        self._now -= 1


@pytest.mark.parametrize("end", [TextStream.close, TextStream.cancel])
def test_a_stream_ended_by_another_thread_computes_its_token_to_the_end(llm, answers, end):
    """The turn was given away under it: "Infer Request is busy" for others, "generator already executing" for this."""
    stream, held = llm.stream(PROMPTS[0], **OPTIONS), Held(llm)
    text = in_thread(lambda: "".join(chunk.text for chunk in stream))
    assert held.is_in.wait(TIMEOUT_S)
    end(stream)
    others = [in_thread(lambda p=prompt: llm.generate(p, **OPTIONS).text) for prompt in PROMPTS[1:]]
    wait_until(lambda: len(llm.turns._waiting) == len(others))
    time.sleep(2 * IDLE_S)
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


def test_a_request_that_waits_for_its_turn_can_be_cancelled(llm):
    stream, held = llm.stream(PROMPTS[0], **OPTIONS), Held(llm)
    computing = in_thread(stream.finish)
    assert held.is_in.wait(TIMEOUT_S)
    other = llm.stream(PROMPTS[1], **OPTIONS)
    waiting = in_thread(other.finish)
    wait_until(lambda: bool(llm.turns._waiting))
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


def test_warming_up_takes_a_turn(llm, answers):
    stream = llm.stream(PROMPTS[0], **OPTIONS)
    begun = read(stream, 3)
    llm.warm_up()
    assert begun + "".join(chunk.text for chunk in stream) == answers[PROMPTS[0]]
