"""Whether the packages of the extra `export` are installed."""

from __future__ import annotations

import importlib.util

from edge_runtime.errors import MissingExtraError

PACKAGES = ("torch", "transformers", "accelerate", "optimum", "nncf", "onnx", "safetensors", "peft")
INSTALL_HINT = 'pip install "edge-runtime[export]"'


def require_export_extra() -> None:
    """Raise MissingExtraError, naming what is missing and the command that installs it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"export needs {', '.join(missing)}, which the runtime alone does not", INSTALL_HINT)
