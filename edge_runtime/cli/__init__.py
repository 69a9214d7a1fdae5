"""The command line `edge-run`: one file for each subcommand, thin; the work is done by `edge_runtime.api`.

    app.py       finds the subcommand, and turns every failure into `error:` and `hint:`
    options.py   the options that generate and chat share, their defaults read from `config.py`
    running.py   load a model and run a stream so that Ctrl-C ends them cleanly
    console.py   text on stdout, everything else on stderr

A subcommand's module is imported when it is called, and imports what it needs inside its function.
"""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def main() -> None:
    """Run `edge-run` with the process's arguments, and exit."""
    try:
        from edge_runtime.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # not sys.exit, which waits for a thread that may still compile a model
    sys.exit(code)
