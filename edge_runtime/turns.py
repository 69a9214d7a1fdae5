"""Whose turn it is: one stream at a time uses the models, from its first token to its last.

Other threads wait for the end of it. A thread that begins another stream while it has read one of its own only half
way goes on with the new one, since it could not read on and wait at once; the half-read one goes on when it is asked
for its next token, and its sequence is read again. A stream that nobody holds any more has no turn.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from edge_runtime.errors import ConfigError


class Stream(Protocol):
    """What takes turns."""

    @property
    def is_computing(self) -> bool:
        """Whether it is producing a token right now, rather than waiting to be asked for one."""


class Turns:
    """Gives the turn to one stream after another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # re-entrant: a stream may be dropped while another takes its turn
        self._holder: weakref.ref[Stream] | None = None
        self._thread = 0

    def take(self, stream: Stream) -> None:
        """Wait until it is the stream's turn.

        Raises:
            ConfigError: The thread's own stream is computing: a callback tries to begin another.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._may_take(stream))
            self._holder, self._thread = weakref.ref(stream), threading.get_ident()

    def give_back(self, stream: Stream) -> None:
        """Let others go on, if it was the stream's turn."""
        with self._changed:
            if self._current() in (stream, None):
                self._holder = None
                self._changed.notify_all()

    def _may_take(self, stream: Stream) -> bool:
        holder = self._current()
        if holder in (stream, None) or self._thread != threading.get_ident():
            return holder in (stream, None)
        if holder.is_computing:
            raise ConfigError("a request was started from within a callback of another", "start it after the other")
        return True

    def _current(self) -> Stream | None:
        return self._holder() if self._holder is not None else None
