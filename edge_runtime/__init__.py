"""edge-run: fast and private language models on a personal computer, through OpenVINO.

    from edge_runtime import EdgeLLM
    llm = EdgeLLM.load("model-folder", draft="draft-folder")
    print(llm.generate("Once upon a time").text)

This package never imports torch, transformers or nncf; names are resolved on first use, so that importing it costs
little more than importing OpenVINO. Nothing is ever reported to anybody: OpenVINO's telemetry package, which its Python
package loads at import, is hidden from it (this also saves a tenth of its import time).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM
    from edge_runtime.config import GenerationConfig, LoadConfig
    from edge_runtime.errors import EdgeError
    from edge_runtime.metrics import Metrics
    from edge_runtime.text.chat_template import Message
    from edge_runtime.text.stream import GenerationResult, TextChunk, TextStream

__version__ = "0.1.0"

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_MODULES = {
    "EdgeError": "errors",
    "EdgeLLM": "api",
    "GenerationConfig": "config",
    "GenerationResult": "text.stream",
    "LoadConfig": "config",
    "Message": "text.chat_template",
    "Metrics": "metrics",
    "TextChunk": "text.stream",
    "TextStream": "text.stream",
}

__all__ = [
    "EdgeError",
    "EdgeLLM",
    "GenerationConfig",
    "GenerationResult",
    "LoadConfig",
    "Message",
    "Metrics",
    "TextChunk",
    "TextStream",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module `edge_runtime` has no attribute `{name}`")
    return getattr(importlib.import_module(f"edge_runtime.{_MODULES[name]}"), name)
