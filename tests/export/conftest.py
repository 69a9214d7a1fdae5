"""Models for the export tests, each made once per session."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_export.quiet import quiet
from edge_runtime.cli.app import run
from tests.export.onnx_models import make_onnx
from tests.tiny_models import tiny_hf, tiny_ir

__all__ = ["tiny_hf", "tiny_ir"]


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection() -> None:
    """Optimum collects garbage three times an export, 0.3 s each over all that its imports brought."""
    with quiet():
        for name in ("nncf", "optimum.exporters.openvino.model_configs", "transformers.models.auto.modeling_auto"):
            importlib.import_module(name)
    gc.freeze()


@pytest.fixture
def edge_run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function from arguments of `edge-run export` to exit code, stdout and stderr of the process itself."""

    def call(*args: object) -> tuple[int, str, str]:
        code = run(["export", *map(str, args)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_onnx(tiny_hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function from a family and PyTorch's kind of attention to an ONNX folder, made once per session."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, attention: str = "sdpa") -> Path:
        key = family, attention
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{attention}") / "onnx"
            made[key] = make_onnx(tiny_hf(family), folder, attention=attention)
        return made[key]

    return get
