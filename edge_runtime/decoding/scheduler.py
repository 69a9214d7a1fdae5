"""Whose tokens go into the next step: many requests, one model, one thread, and nobody starves.

Requests come from any thread and are stepped together by one of ours, which lives only while there is something to
compute. What happens to a reader, be it slow, dropped, interrupted or failed, happens in a thread of its own and
disturbs no step: a reader that does not read is left out of the steps once a few tokens wait for it, and its share of
the model goes to others who want one. A request is cancelled by a flag that the next step obeys.

Answers being written take part in every step. Prompts are read beside them in chunks, one after another in turn, so
that a long one delays neither answers nor short prompts by more than a chunk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.request import Request
from edge_runtime.errors import EdgeError
from edge_runtime.models.base import num_common

MOST_KV_BYTES = 1 << 30
"""Most bytes of keys and values of requests that are stepped together; one always is, whatever it takes."""
POLL_S = 0.1
"""How long a caller waits before it looks again: on Windows Ctrl-C does not end a wait."""
T = TypeVar("T")
SHARED_TOKENS = 32
"""A request waits for another that is reading what both begin with, if this saves it so many tokens."""


class _Call(Generic[T]):
    """What is done between two steps, and its result or exception."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._is_done = threading.Event()

    def run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the result
            self._error = error
        self._is_done.set()

    def result(self) -> T:
        while not self._is_done.wait(POLL_S):
            pass
        if self._error:
            raise self._error
        return self._outcome[0]


class Scheduler:
    """Steps requests until each has ended.

    Args:
        engine: Steps them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._arriving: deque[Request] = deque()
        self._calls: deque[_Call[Any]] = deque()
        self._waiting: list[Request] = []
        self._live: list[Request] = []
        self._running, self._closing = threading.Lock(), threading.Lock()
        self._main_thread = threading.main_thread()
        self._is_closed = False

    def submit(self, requests: list[Request]) -> None:
        """Step requests from now on; their readers take what comes of them. From any thread.

        Raises:
            EdgeError: The model was closed.
        """
        self.check_open()
        self._arriving.extend(requests)
        self.go_on()

    def call(self, work: Callable[[], T]) -> T:
        """Do something with the models between two steps, in the thread that computes; return its result.

        Raises:
            EdgeError: The model was closed.
        """
        self.check_open()
        call = _Call(work)
        self._calls.append(call)
        self.go_on()
        return call.result()

    def go_on(self) -> None:
        """Let requests be stepped if they are not; to be called when a reader wants more, or cancels."""
        if self._is_closed:
            self._end_all()
        elif not self._running.locked() and self._has_work():
            threading.Thread(target=self._run, name="edge-run engine").start()

    def close(self) -> bool:
        """Cancel all requests, after the step that runs; return False where that was done before."""
        with self._closing:
            was_closed, self._is_closed = self._is_closed, True
        self._end_all()
        return not was_closed

    def _end_all(self) -> None:
        with self._running:
            for request in (*self._live, *self._waiting, *self._arriving):
                self.engine.finish(request, "cancelled")
            self._live, self._waiting = [], []
            self._arriving.clear()
            while self._calls:
                self._calls.popleft().run()

    def check_open(self) -> None:
        """Refuse to go on with a model that was closed.

        Raises:
            EdgeError: It was.
        """
        if self._is_closed:
            raise EdgeError("the model was closed", "load it again")

    def _run(self) -> None:
        # Asked again after the lock is free: whoever found it taken has relied on this thread.
        while self._has_work() and self._running.acquire(blocking=False):
            try:
                while self._step():
                    pass
            finally:
                self._running.release()

    def _has_work(self) -> bool:
        if self._is_closed:
            return False
        return bool(self._arriving or self._calls) or any(_is_due(request) for request in (*self._live, *self._waiting))

    def _step(self) -> bool:
        """Take one step; return whether there was one to take."""
        if self._arriving or self._waiting or self._calls or not self._main_thread.is_alive():
            self._attend()
        active = []
        for request in self._live:
            if request.is_cancelled:
                self.engine.finish(request, "cancelled")
            elif request.reader.wants_more:
                active.append(request)
        if self._is_closed or not active:
            self._drop_ended()
            return False
        first = next((request for request in active if request.is_reading), None) if len(active) > 1 else None
        try:
            self.engine.step(active)
        except BaseException as error:  # noqa: BLE001 - it reaches every reader whose request was in the step
            for request in active:
                if request.finish_reason is None:
                    self.engine.finish(request, "error", error)
        if first:  # has read a chunk: another one's prompt is read first in the next step
            self._live.remove(first)
            self._live.append(first)
        self._drop_ended()
        return True

    def _drop_ended(self) -> None:
        for request in self._live:
            if request.finish_reason is not None:
                self._live = [each for each in self._live if each.finish_reason is None]
                return

    def _attend(self) -> None:
        """Do what is rarely due: calls, and requests that come, wait, or are left by a process that ends."""
        if not self._main_thread.is_alive():  # the process waits for this thread
            for request in (*self._live, *self._waiting, *self._arriving):
                request.is_cancelled |= not request.reader.has_reader
        while self._calls:
            self._calls.popleft().run()
        self._admit()

    def _admit(self) -> None:
        """Let those who wait take part, the first come first, as far as there is room."""
        while self._arriving:
            self._waiting.append(self._arriving.popleft())
        waiting, self._waiting = self._waiting, []
        for number, request in enumerate(waiting):
            if request.is_cancelled:
                self.engine.finish(request, "cancelled")
            elif not request.reader.wants_more or self._is_being_read(request):
                self._waiting.append(request)
            elif self._make_room_for(request):
                self._open(request)
            else:
                self._waiting += waiting[number:]
                return

    def _open(self, request: Request) -> None:
        try:
            self.engine.open(request)
        except Exception as error:  # noqa: BLE001 - its reader gets it; there may be no memory, for example
            self.engine.finish(request, "error", error)
        else:
            self._live.append(request)

    def _make_room_for(self, request: Request) -> bool:
        """Return whether a request may be opened, if need be in the place of one whose reader does not read."""
        while not self._has_room_for(request):
            idle = next((other for other in self._live if not other.reader.wants_more), None)
            if idle is None:
                return False
            self._live.remove(idle)
            self._waiting.append(idle)
            self.engine.close(idle)
        return True

    def _has_room_for(self, request: Request) -> bool:
        target = self.engine.target
        tokens = request.end + sum(other.end for other in self._live)
        return not self._live or (
            len(self._live) < target.max_sequences and tokens * target.token_kv_bytes <= MOST_KV_BYTES
        )

    def _is_being_read(self, request: Request) -> bool:
        """Whether another request is about to read what this one begins with too."""
        return any(other.is_reading and _num_to_share(request, other) >= SHARED_TOKENS for other in self._live)


def _is_due(request: Request) -> bool:
    return request.is_cancelled or request.reader.wants_more


def _num_to_share(request: Request, other: Request) -> int:
    """Return how many of the tokens that two requests begin with the other one has still to read."""
    assert other.sequence is not None
    return num_common(request.token_ids, other.token_ids) - other.sequence.num_tokens
