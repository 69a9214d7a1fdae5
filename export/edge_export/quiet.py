"""Keep the libraries below us from phoning home, writing on the terminal, or breaking on parts no text model needs.

Our own progress and errors go through the callback and the exception tree, so whatever torch, transformers, optimum
and nncf print is noise; standard output stays clean for the caller.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_HIDDEN = {
    "torchvision": "built for another torch it fails with `operator torchvision::nms does not exist` and takes every "
    "transformers model class with it; only image processors use it",
    "openvino_telemetry": "openvino and nncf report each conversion to a web service unless told not to",
}
_LOGGERS = ("transformers", "optimum", "nncf", "torch", "huggingface_hub", "openvino")


def hide_packages() -> None:
    """Make optional packages look absent, except where the process already uses them.

    A None in `sys.modules` makes both `import` and `importlib.util.find_spec` answer that there is no such package,
    and all users of these two have a path for that.
    """
    for name in _HIDDEN:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines, progress bars and prints inside a `with` block."""
    hide_packages()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
