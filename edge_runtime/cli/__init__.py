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
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def main() -> None:
    """Run `edge-run` with the process's arguments, and exit."""
    _open_closed_streams()
    try:
        from edge_runtime.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk, or a reader that has left
                stream.flush()
        os._exit(INTERRUPTED)  # not sys.exit, which waits for a thread that may still compile a model
    sys.exit(code)


def _open_closed_streams() -> None:
    """Connect standard streams that are closed (`>&-`, or pythonw.exe) to the null device.

    Otherwise the next file to be opened would take a closed stream's number, and receive what a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends
