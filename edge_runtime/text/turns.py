"""Whose turn it is: one request at a time uses the models, and keeps them while its reader keeps asking.

A request is a generator that takes the turn before each step and pauses after it. Others wait, the first come first. A
turn that is paused for longer than IDLE_S while others wait goes to the next of them: a slow reader loses it, and so
does one that will never ask again, whoever still holds its stream. It also goes to another request of the very thread
that has paused it, which could not read on and wait at once. Who has lost a turn waits for another, and reads its
sequence again.

Nothing here has to be put right after an exception, wherever it came: whether a turn is in use is read off the
generator, which is running or not, and those who wait look again every POLL_S. The locks are those of the interpreter,
which an interruption cannot leave taken, as it can a `threading.Condition`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import time
import weakref
from collections.abc import Generator
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.forks import HomeProcess

IDLE_S = 0.1
"""How long a turn waits for its reader while others wait for the turn: to read a sequence again often costs more."""
POLL_S = 0.05

Steps = Generator[Any, None, None]


class Turns:
    """Gives the turn to one request after another.

    Args:
        home: Where the models were loaded.
    """

    def __init__(self, home: HomeProcess) -> None:
        self._home = home
        self._lock = threading.RLock()  # re-entrant: a signal's handler may close a stream
        self._waiting: list[Turn] = []
        self._holder: Turn | None = None
        self._thread = 0
        self._paused_at = math.inf

    def take(self, turn: Turn) -> bool:
        """Wait for the turn; return whether it came before the request was cancelled.

        Raises:
            ConfigError: A callback of the request that is computing asks for it.
            EdgeError: The process is a fork of that which loaded the models.
        """
        self._home.check()
        while not turn.is_cancelled:
            if self._take_if_free(turn):
                return True
            turn.sleep(POLL_S)
        return False

    def pause(self) -> None:
        """Begin to wait for the next step of the request that has the turn."""
        self._paused_at = time.perf_counter()

    def give_back(self, turn: Turn) -> None:
        """Let others go on; only the turn's own request calls this."""
        with self._lock:
            if self._holder is turn:
                self._holder = None
        self.wake()

    def wake(self) -> None:
        """Let those who wait look again."""
        for turn in self._waiting.copy():
            turn.wake()

    def _take_if_free(self, turn: Turn) -> bool:
        with self._lock:
            if self._holder is not turn:
                if turn not in self._waiting:
                    self._waiting.append(turn)
                while not self._waiting[0].is_running:  # it was interrupted or cancelled
                    del self._waiting[0]
                if not self._is_free() or self._waiting[0] is not turn:
                    return False
                del self._waiting[0]
            self._holder, self._thread, self._paused_at = turn, threading.get_ident(), math.inf
            return True

    def _is_free(self) -> bool:
        holder, is_own_thread = self._holder, self._thread == threading.get_ident()
        if holder is None:
            return True
        if holder.is_running:
            if is_own_thread and self._paused_at == math.inf:
                raise ConfigError("a request was started from within a callback of another", "start it after the other")
            return False
        return holder.is_over or is_own_thread or time.perf_counter() - self._paused_at > IDLE_S


class Turn:
    """One request's part in taking turns.

    Args:
        turns: Who may use the models now.
        steps: The request; it calls the methods below.
    """

    def __init__(self, turns: Turns, steps: Steps) -> None:
        self._turns = turns
        self._steps = weakref.ref(steps)  # the turns keep nothing alive
        self._asleep = threading.Lock()
        self.is_cancelled = False

    @property
    def is_running(self) -> bool:
        """Whether the request computes or waits for its turn, rather than for its reader."""
        return self._state == inspect.GEN_RUNNING

    @property
    def is_over(self) -> bool:
        """Whether no step will follow."""
        return self.is_cancelled or self._state == inspect.GEN_CLOSED

    def take(self) -> bool:
        """Wait for the turn; return whether it came before the request was cancelled."""
        return self._turns.take(self)

    def pause(self) -> None:
        """Keep the turn for a while, for the reader to ask for the next step."""
        self._turns.pause()

    def give_back(self) -> None:
        """Let others go on."""
        self._turns.give_back(self)

    def sleep(self, seconds: float) -> None:
        """Sleep until `wake`, or so long."""
        self._asleep.acquire(timeout=seconds)

    def wake(self) -> None:
        """Wake the one who sleeps, or the next who would."""
        with contextlib.suppress(RuntimeError):  # awake already
            self._asleep.release()

    def cancel(self) -> None:
        """End the request after its current step. Takes no lock, so a signal's handler may call it anywhere."""
        self.is_cancelled = True

    def close(self) -> None:
        """End the request after its current step, and let others go on as soon as it is over."""
        self.is_cancelled = True
        self._turns.wake()

    @property
    def _state(self) -> str:
        steps = self._steps()
        return inspect.GEN_CLOSED if steps is None else inspect.getgeneratorstate(steps)
