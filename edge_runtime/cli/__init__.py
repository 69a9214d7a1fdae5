"""The command line `edge-run`: one file for each subcommand, thin; the work is done by `edge_runtime.api`.

    app.py       finds the subcommand, and turns every failure into `error:` and `hint:`
    options.py   the options that generate and chat share, their defaults read from `config.py`
    running.py   load a model and run a stream so that Ctrl-C ends them cleanly
    console.py   text on stdout, everything else on stderr

A subcommand's module is imported when it is called, and imports what it needs inside its function.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class Terminated(BaseException):
    """The process was asked to end: what has begun is cleaned up, and nothing goes on as it may after Ctrl-C.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def main() -> None:
    """Run `edge-run` with the process's arguments, and exit."""
    _open_closed_streams()
    _clean_up_when_terminated()
    try:
        from edge_runtime.cli.app import run

        code = run(sys.argv[1:])
    except (KeyboardInterrupt, Terminated) as interrupt:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk, or a reader that has left
                stream.flush()
        # Not sys.exit, which waits for a thread that may still compile a model.
        os._exit(getattr(interrupt, "exit_code", INTERRUPTED))
    sys.exit(code)


def _open_closed_streams() -> None:
    """Connect standard streams that are closed (`>&-`, or pythonw.exe) to the null device.

    Otherwise the next file to be opened would take a closed stream's number, and receive what a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def _clean_up_when_terminated() -> None:
    """Raise `Terminated` at SIGTERM, and at SIGHUP of a closed terminal; where they are ignored, they stay so."""

    def end(number: int, _: Any) -> None:
        raise Terminated(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
