"""OpenVINO comes without its converter, and nobody who wants it misses it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_running_a_model_does_not_load_the_converter():
    source = "import sys; from edge_runtime import EdgeLLM; print('openvino.tools.ovc' in sys.modules)"
    assert run(source) == "False"


@pytest.mark.parametrize(
    "wanted",
    [
        "import openvino; convert = openvino.convert_model",
        "from openvino import convert_model as convert",
        "from openvino.tools.ovc import convert_model as convert",
    ],
)
def test_who_wants_the_converter_has_it(wanted):
    source = f"from edge_runtime import EdgeLLM; {wanted}; print(convert.__module__)"
    assert run(source).startswith("openvino.tools.ovc")


def test_other_names_are_still_missing():
    source = "from edge_runtime import EdgeLLM; import openvino; print(hasattr(openvino, 'nonsense'))"
    assert run(source) == "False"


def test_an_openvino_that_is_there_already_is_left_alone():
    source = "import openvino; from edge_runtime import EdgeLLM; print('__getattr__' in vars(openvino))"
    assert run(source) == "False"
