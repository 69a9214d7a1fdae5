"""What every test may ask for, and when a test is skipped.

A test that cannot run here is skipped with a reason. In CI (environment variable `CI=true`) what CI installs must be
there, so the same lack is a failure: a green run never means that half of it was skipped.
"""

from __future__ import annotations

import functools
import os
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
