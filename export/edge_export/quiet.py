"""Keep the libraries below us from writing on the user's terminal, and from breaking on parts no language model needs.

Everything here is about torch, transformers, optimum and nncf behaving as libraries: our own progress and errors go
through the callback and the exception tree, so whatever these print is noise.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_LOGGERS = ("transformers", "optimum", "nncf", "torch", "huggingface_hub", "openvino")


def hide_torchvision() -> None:
    """Make transformers believe that torchvision is not installed, unless it is already in use.

    A torchvision built for another torch fails with `operator torchvision::nms does not exist` and takes every
    transformers model class with it. Only image processors use it. A None in `sys.modules` makes both `import` and
    `importlib.util.find_spec` answer "absent".
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines, progress bars and prints of the export libraries inside a `with` block."""
    hide_torchvision()
    _disable_telemetry_and_bars()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent_stderr():
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _silent_stderr() -> contextlib.AbstractContextManager[object]:
    return contextlib.redirect_stderr(io.StringIO())


def _disable_telemetry_and_bars() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
