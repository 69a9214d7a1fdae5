"""What every test may ask for, and when a test is skipped.

A test that cannot run here is skipped with a reason. In CI (environment variable `CI=true`) what CI installs must be
there, so the same lack is a failure: a green run never means that half of it was skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import openvino
import pytest

import ov_kernels
from tests.tiny_models import tiny_hf, tiny_ir

__all__ = ["tiny_hf", "tiny_ir"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models, tokenizers and texts, kept beside the checkout rather than in it."""
    folder = Path(os.environ.get("EDGE_RUN_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        _lacks(f"no test data at `{folder}`; name its folder in EDGE_RUN_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def smollm2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder, which its own script makes of a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        _lacks("the package gguf is not installed")
    pytest.importorskip("transformers")
    script, folder = shared_data / "tools" / "smollm2_to_hf.py", tmp_path_factory.mktemp("smollm2") / "hf"
    hide = "import runpy, sys; sys.modules['torchvision'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    subprocess.run([sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {hide}", script, folder], check=True)
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernels") and ov_kernels.library_path() is None:
        _lacks("the compiled ov_kernels library is not installed")
    for name in ("gpu", "npu"):
        if item.get_closest_marker(name) and not _has_device(name.upper()):
            pytest.skip(f"OpenVINO finds no {name.upper()} here")


def _lacks(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@functools.cache
def _has_device(kind: str) -> bool:
    return any(device.split(".")[0] == kind for device in openvino.Core().available_devices)
