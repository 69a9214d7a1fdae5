"""Work in a second thread, whose result or exception is the waiting thread's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Begins to work at once.

    Args:
        work: The work; its result or exception comes out of `result`.
        daemon: Whether the process may end before the work. OpenVINO's threads abort a process that leaves them behind
            while it fails.
    """

    def __init__(self, work: Callable[[], T], *, daemon: bool = True) -> None:
        self._outcome: list[T] = []
        self._failure: list[BaseException] = []
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=daemon)
        self._thread.start()

    def is_done(self, wait_s: float) -> bool:
        """Wait for the end of the work, so many seconds at most; return whether it came."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the end of the work; return its result, or raise what it raised."""
        self._thread.join()
        if self._failure:
            raise self._failure[0]
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks for the result
            self._failure.append(error)
