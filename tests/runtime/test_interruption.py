"""Ctrl-C raises wherever it comes in the thread that reads: whatever it interrupts, only that request ends.

It is raised at each line of ours that this thread runs for a request, once where the line runs first and once where it
runs last. Not where a `with` statement ends: Python looks for signals where calls return and loops turn, and nothing of
that lies between the block and the exit of a lock. Nor in `__del__`, out of which Python raises nothing. The engine's
thread gets no signals.
"""

from __future__ import annotations

import functools
import linecache
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_runtime
from edge_runtime.api import EdgeLLM
from tests.runtime.fakes import blended_table, make_engine, make_llm, random_table

ROOT = Path(edge_runtime.__file__).parent
OURS = tuple(str(ROOT / name) for name in ("api.py", "forks.py", "decoding", Path("text", "stream.py")))
"""What a request goes through; options, templates and tokenizers hold nothing of one."""
TARGET = random_table(24, 1)
DRAFT = blended_table(TARGET, random_table(24, 2), 0.4)
TIMEOUT_S = 20.0
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "num_draft_tokens": 2, "lookup": True}
LONG = {**OPTIONS, "max_new_tokens": 60}
"""More than is written ahead of a reader."""

WHICH: dict[str, Callable[[int], tuple[int, ...]]] = {
    "first": lambda count: (0,),
    "last": lambda count: (count - 1,),
    "both": lambda count: (0, count - 1),
}

Place = tuple[str, int, int]
"""File, line, and how often the line was run before."""


class Interrupter:
    """Raises KeyboardInterrupt at one place; with none, notes all of them."""

    def __init__(self, place: Place | None = None) -> None:
        self._place = place
        self.seen: Counter[tuple[str, int]] = Counter()
        self._entered: dict[Any, set[int]] = {}

    def run(self, work: Callable[[], Any]) -> None:
        before = sys.gettrace()  # a debugger's, or that which measures coverage
        sys.settrace(self._enter)
        try:
            work()
        except KeyboardInterrupt:
            assert self._place
        finally:
            sys.settrace(before)
            self._entered.clear()  # frames hold streams

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        is_ours = frame.f_code.co_filename.startswith(OURS) and frame.f_code.co_name != "__del__"
        return self._step if is_ours else None

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and not self._ends_with_statement(frame):
            line = frame.f_code.co_filename, frame.f_lineno
            is_here = self._place == (*line, self.seen[line])
            self.seen[line] += 1
            if is_here:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._step

    def _ends_with_statement(self, frame: Any) -> bool:
        """Whether the line begins with `with` and has begun in this frame before."""
        if not is_with_statement(frame.f_code.co_filename, frame.f_lineno):
            return False
        entered = self._entered.setdefault(frame, set())
        is_end = frame.f_lineno in entered
        entered ^= {frame.f_lineno}
        return is_end


@functools.cache
def is_with_statement(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith("with ")


def places(work: Callable[[], Any], which: str = "both") -> list[Place]:
    """Return the first place of each line that runs, the last one, or both."""
    noting = Interrupter()
    noting.run(work)
    return sorted({(*line, at) for line, count in noting.seen.items() for at in WHICH[which](count)})


def read(llm: EdgeLLM) -> None:
    with llm.stream("abqrs", **LONG) as stream:
        next(stream), next(stream)


def read_unclosed(llm: EdgeLLM) -> None:
    for number, _ in enumerate(llm.stream("abcab", **LONG)):
        if number == 3:
            break


def poll(llm: EdgeLLM) -> None:
    stream = llm.stream("abcab", on_prefill=lambda done, wanted: None, **OPTIONS)
    try:
        while True:
            if stream.poll() is None:
                time.sleep(0.0005)
    except StopIteration:
        pass
    assert stream.result.finish_reason == "length"


def cancel(llm: EdgeLLM) -> None:
    stream = llm.stream("abcab", **LONG)
    next(stream)
    stream.cancel()
    stream.close()


USES: dict[str, Callable[[EdgeLLM], Any]] = {
    "generate": lambda llm: llm.generate("abcabcabqrs", **OPTIONS),
    "generate_many": lambda llm: llm.generate_many(["abcab", "x"], max_new_tokens=2, seed=1),
    "read": read,
    "read, not closed": read_unclosed,
    "poll": poll,
    "cancel": cancel,
}


@pytest.mark.parametrize("use", USES)
def test_an_interrupted_reader_leaves_nothing_behind(tmp_path, use):
    """The next answer is right, at once, and neither a thread nor a request nor a sequence stays."""
    wanted = make_llm(tmp_path, make_engine(TARGET, DRAFT)).generate("abcabcx", **OPTIONS).text
    llm = make_llm(tmp_path, make_engine(TARGET, DRAFT, chunk_size=4))

    def work() -> None:
        USES[use](llm)

    for place in places(work):
        Interrupter(place).run(work)
        assert answer_in_thread(llm) == wanted, place
        wait_until(lambda: is_idle(llm), place)


def test_an_interrupted_reader_disturbs_no_other(tmp_path):
    """Another stream is half read, and goes on."""
    llm = make_llm(tmp_path, make_engine(TARGET, DRAFT, chunk_size=4))
    wanted = llm.generate("abcab", **LONG).text

    def work() -> None:
        llm.generate("abqrs", **OPTIONS)

    for place in places(work, "last"):
        other = llm.stream("abcab", **LONG)
        next(other), next(other)
        Interrupter(place).run(work)
        assert other.finish().text == wanted, place


def answer_in_thread(llm: EdgeLLM) -> str:
    """Return an answer that another thread asks for: what waits for ever fails here."""
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(llm.generate("abcabcx", **OPTIONS).text), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert texts, "it waits for ever"
    return texts[0]


def is_idle(llm: EdgeLLM) -> bool:
    scheduler, models = llm._scheduler, (llm.target, llm.drafter.model)
    requests = [*scheduler._live, *scheduler._waiting, *scheduler._arriving]
    sequences = [sequence for model in models for sequence in model.open_sequences]
    threads = [thread for thread in threading.enumerate() if thread.name == "edge-run engine"]
    return not (requests or sequences or threads)


def wait_until(is_true: Callable[[], bool], place: Place) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < end, place
        time.sleep(0.0005)
