"""Whether the packages of the extra `export` are installed."""

from __future__ import annotations

import importlib.util

from edge_runtime.errors import MissingExtraError

PACKAGES = ("torch", "transformers", "accelerate", "optimum", "nncf", "onnx", "safetensors", "peft")


def require_export_extra() -> None:
    """Raise MissingExtraError, naming what is missing and the command that installs it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"this command needs packages that are not installed: {', '.join(missing)}", "export")
