"""Import OpenVINO without what running a model never needs: half of its Python package's import time.

The package imports its model converter (`openvino.tools.ovc`, 31 of 60 ms) if it is there, and does without if it is
not. Here it is not, for the moment of the import; `openvino.convert_model` then loads it on first use, so that a
program with both halves, or with OpenVINO of its own, misses nothing. A process that has OpenVINO already keeps it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_CONVERTER = "openvino.tools.ovc"


def _resolve(name: str) -> Any:
    if name != "convert_model":
        raise AttributeError(f"module `openvino` has no attribute `{name}`")
    return importlib.import_module(_CONVERTER).convert_model


if "openvino" not in sys.modules:
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
    try:
        import openvino as ov
    finally:
        del sys.modules[_CONVERTER]
    ov.__getattr__ = _resolve
else:
    import openvino as ov

__all__ = ["ov"]
