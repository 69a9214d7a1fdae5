"""CatsMlp asked by several threads at once: scratch memory is shared between calls, never between two at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray
from openvino import opset13
from openvino.utils.node_factory import NodeFactory

import ov_kernels
from ov_kernels.mlp_blob import pack
from tests.kernels.test_cats_mlp import make_mlp, tokens

pytestmark = pytest.mark.kernels


REQUESTS, ROUNDS = 4, 12


def two_layers(form: str, sizes: list[tuple[int, int]]) -> openvino.Model:
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    x = opset13.parameter([-1, sizes[0][0]], np.float32)
    node: Any = x
    for seed, (hidden, ffn) in enumerate(sizes):
        constants = [opset13.constant(pack(make_mlp(form, hidden, ffn, seed))), opset13.constant(np.float32([0.05]))]
        node = factory.create("CatsMlp", [node.output(0), *(c.output(0) for c in constants)], {"exact": False})
    return openvino.Model([node.output(0)], [x])


@pytest.mark.parametrize("form", ["i8", "u4"])
@pytest.mark.parametrize("config", [{"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2}, {"NUM_STREAMS": 1}])
def test_requests_at_once_answer_as_one_by_one(isa: str, form: str, config: dict[str, int]) -> None:
    """Rows differ from call to call, so a buffer that two calls hold, or one left too small, shows."""
    core = openvino.Core()
    ov_kernels.add_to(core, required=True)
    ffn = [256, 256] if isa == "ref" else [1280, 384]
    settings = {"INFERENCE_PRECISION_HINT": "f32", **config}
    compiled = core.compile_model(two_layers(form, [(128, size) for size in ffn]), "CPU", settings)
    inputs = [tokens(rows, 128, seed=rows) for rows in (1, 3, 8, 9, 30, 2)]
    alone = compiled.create_infer_request()
    wanted = [alone.infer([x])[0].copy() for x in inputs]

    def ask(first: int) -> list[tuple[int, NDArray[np.float32]]]:
        request = compiled.create_infer_request()
        order = [(first + 5 * k) % len(inputs) for k in range(ROUNDS)]
        return [(i, request.infer([inputs[i]])[0].copy()) for i in order]

    with ThreadPoolExecutor(REQUESTS) as pool:
        for answers in pool.map(ask, range(REQUESTS)):
            for i, got in answers:
                np.testing.assert_array_equal(got, wanted[i])
