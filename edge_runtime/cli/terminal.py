"""Keep what is typed during an answer out of the answer.

A terminal echoes keys as they are typed, into whatever is being printed. While an answer streams, it is told not to.
What was typed is kept for the next line, as shells keep it, if `readline` will show it there; otherwise it is dropped,
since nobody could see what they are about to send. A Windows console echoes only while a program reads: nothing to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

_HAS_TERMIOS = importlib.util.find_spec("termios") is not None


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Switch the terminal's echo off, and on again whatever happens.

    Where stdin is no terminal, or the process is in the background, nothing happens.
    """
    restore = _switch_echo_off()
    if restore is None:
        yield
        return
    try:
        yield
    finally:
        restore()


def _switch_echo_off() -> Callable[[], None] | None:
    """Return what switches it on again; None if there was nothing to switch off."""
    if not _HAS_TERMIOS or not sys.stdin.isatty():
        return None
    import termios

    try:
        number = sys.stdin.fileno()
        if os.tcgetpgrp(number) != os.getpgrp():
            return None  # a background process that changes its terminal is stopped
        before = termios.tcgetattr(number)
        quiet = [*before]
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(number, termios.TCSADRAIN, quiet)
    except (OSError, termios.error):
        return None
    when = termios.TCSADRAIN if "readline" in sys.modules else termios.TCSAFLUSH

    def restore() -> None:
        with contextlib.suppress(OSError, termios.error):  # the terminal is gone
            termios.tcsetattr(number, when, before)

    return restore
