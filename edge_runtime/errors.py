"""Every error that edge-run raises on purpose, in one tree.

    EdgeError
    ├── ConfigError (ValueError)   an option or argument with a value that cannot be used
    ├── ModelFormatError           a model folder or file that is missing, damaged or not understood
    ├── ModelPairError             a target and a draft that do not belong together
    ├── ContextOverflowError       more tokens than the model's context holds
    ├── LogitsError                logits from which no token can be drawn
    ├── DeviceError                a device that is absent or refuses the model
    ├── ExtensionError             the compiled ov_kernels library is absent or does not fit
    ├── MissingExtraError          a feature whose optional dependencies are not installed
    ├── DownloadError              the model hub could not be reached or has no such model
    └── ExportError                a source model that cannot be converted

A message says what was wrong with the value got and what was expected; `hint` says what to do.
The command line prints both on two lines and exits with `exit_code`: 2 for a wrong call, 1 for everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DISTRIBUTION = "edge-runtime"
"""What pip calls this project."""


class EdgeError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One line: what was wrong with the value got, and what was expected.
        hint: One line: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # a traceback shows it


class ConfigError(EdgeError, ValueError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class ModelFormatError(EdgeError):
    """A model folder or file is missing, damaged or not understood."""


class ModelPairError(EdgeError):
    """Target and draft do not share one vocabulary."""


class ContextOverflowError(EdgeError):
    """The prompt leaves no room for a new token in the model's context."""


class LogitsError(EdgeError):
    """No token can be drawn: the model's logits are NaN or infinite, or the options forbid every token."""


class DeviceError(EdgeError):
    """The device is absent, or refuses the model."""


class ExtensionError(EdgeError):
    """The compiled ov_kernels library is absent or was built for another OpenVINO."""


class MissingExtraError(EdgeError):
    """A feature was asked for whose optional dependencies are not installed.

    Args:
        message: One line: what is missing, and for what.
        extra: Name of the optional dependencies. The hint installs them from where edge-run itself was installed from.
    """

    def __init__(self, message: str, extra: str) -> None:
        super().__init__(message, _install_command(extra))


class DownloadError(EdgeError):
    """The model hub could not be reached, or has no such model."""


class ExportError(EdgeError):
    """The source model cannot be converted."""


def _install_command(extra: str) -> str:
    from pathlib import Path
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    origin = _installed_from()
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f'pip install "{DISTRIBUTION}[{extra}] @ {origin["vcs_info"]["vcs"]}+{url}"'
    path = url2pathname(urlsplit(url).path) if url.startswith("file:") else ""
    if path and Path(path).exists():
        return f'pip install "{path}[{extra}]"'
    return f'pip install ".[{extra}]", in the source folder of edge-run'


def _installed_from() -> dict[str, Any]:
    """Return pip's record of the folder, file or repository that it was given; empty where there is none."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        record = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` begins, or else resembles most, to be suggested; None where none is near."""
    import difflib  # only for those who mistype

    words = list(known)
    begun = [name for name in words if name.startswith(word)] if len(word) > 1 else []
    return next(iter(begun or difflib.get_close_matches(word, words, n=1)), None)
