"""The op Threshold through OpenVINO's CPU plugin, against its formula in numpy.

The op is exact, so every comparison is of bits: a float that differs in its last place, in the sign of a zero or in a
NaN's payload is a failure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as op
from openvino.utils.node_factory import NodeFactory

import ov_kernels
from edge_runtime.errors import ExtensionError

pytestmark = pytest.mark.kernels

TASK_SIZE = 16384  # elements that one thread takes at a time; sizes around it cut the work unevenly
# A tenth and a third have no finite binary form; the others fill the text with exponents.
THRESHOLDS = (0.0, 0.1, 1 / 3, 1e-30, 7.0, 1.234567e38)


def threshold_reference(x: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(np.abs(x) <= np.float32(threshold), np.float32(0), x)


def make_model(threshold: float, shape: list[int]) -> openvino.Model:
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    x = op.parameter(shape, np.float32, name="x")
    node = factory.create("Threshold", [x.output(0)], {"threshold": threshold})
    return openvino.Model([node.output(0)], [x], "threshold")


def save(model: openvino.Model, folder: Path) -> Path:
    path = folder / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def compile_ir(path: Path, **properties: object) -> openvino.CompiledModel:
    core = openvino.Core()
    ov_kernels.add_to(core, required=True)
    return core.compile_model(core.read_model(path), "CPU", properties)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.fixture(scope="module")
def dynamic_ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(0.5, [-1, -1]), tmp_path_factory.mktemp("threshold"))


@pytest.mark.parametrize("count", [1, 3, 31, 1023, TASK_SIZE - 1, TASK_SIZE, TASK_SIZE + 1, 3 * TASK_SIZE + 7])
def test_equals_formula_at_every_size(dynamic_ir: Path, count: int) -> None:
    x = np.random.default_rng(count).standard_normal((1, count), dtype=np.float32)
    assert_same_bits(compile_ir(dynamic_ir)(x)[0], threshold_reference(x, 0.5))


def test_one_compiled_model_takes_changing_shapes(dynamic_ir: Path) -> None:
    compiled = compile_ir(dynamic_ir)
    rng = np.random.default_rng(0)
    for shape in [(2, 5), (7, 1), (1, 40000), (0, 3), (2, 5)]:
        x = rng.standard_normal(shape, dtype=np.float32)
        assert_same_bits(compiled(x)[0], threshold_reference(x, 0.5))


@pytest.mark.parametrize("shape", [[7], [2, 3, 5], [1]])
def test_static_shapes(tmp_path: Path, shape: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    compiled = compile_ir(save(make_model(0.5, shape), tmp_path))
    assert_same_bits(compiled(x)[0], threshold_reference(x, 0.5))


def test_empty_input_gives_empty_output(dynamic_ir: Path) -> None:
    assert compile_ir(dynamic_ir)(np.empty((0, 4), np.float32))[0].shape == (0, 4)


def test_nan_stays_nan_and_infinity_is_kept(dynamic_ir: Path) -> None:
    """`|x| > threshold ? x : 0` would turn NaN into 0 and hide a broken layer."""
    x = np.array([[np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, -0.5]], np.float32)
    x.view(np.uint32)[0, 0] |= 0x1234  # a payload
    got = compile_ir(dynamic_ir)(x)[0]
    assert_same_bits(got, threshold_reference(x, 0.5))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_attribute_survives_the_ir_to_the_last_bit(tmp_path: Path, threshold: float) -> None:
    """An attribute printed with too few digits would move the edge by one float."""
    edge = np.float32(threshold)
    x = np.array([edge, -edge, np.nextafter(edge, np.float32(np.inf)), np.nextafter(edge, np.float32(0))])
    compiled = compile_ir(save(make_model(threshold, [-1]), tmp_path))
    assert_same_bits(compiled(x)[0], threshold_reference(x, threshold))


def test_any_number_of_threads_gives_the_same_bits(dynamic_ir: Path) -> None:
    one = compile_ir(dynamic_ir, INFERENCE_NUM_THREADS=1)
    two = compile_ir(dynamic_ir, INFERENCE_NUM_THREADS=2)
    rng = np.random.default_rng(2)
    for _ in range(25):
        shape = (int(rng.integers(1, 9)), int(rng.integers(1, 3 * TASK_SIZE)))
        x = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)  # every kind of float, NaN among them
        x[np.abs(x) < np.finfo(np.float32).tiny] = 0  # a plugin may flush subnormals: not this op's promise
        expected = threshold_reference(x, 0.5)
        assert_same_bits(one(x)[0], expected)
        assert_same_bits(two(x)[0], expected)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_precision_hint_does_not_round_the_input(dynamic_ir: Path, precision: str) -> None:
    x = np.array([[np.nextafter(np.float32(0.5), np.float32(1)), 1 / 3, 1.001]], np.float32)
    compiled = compile_ir(dynamic_ir, INFERENCE_PRECISION_HINT=precision)
    assert_same_bits(compiled(x)[0], threshold_reference(x, 0.5))


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_bad_threshold_is_refused_with_the_value(threshold: float) -> None:
    with pytest.raises(RuntimeError, match=r"threshold = -?(1|nan|inf), expected a finite number of at least 0"):
        make_model(threshold, [4])


def test_other_type_is_refused_with_its_name() -> None:
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    with pytest.raises(RuntimeError, match="input of type i32, expected f32"):
        factory.create("Threshold", [op.parameter([4], np.int32).output(0)], {"threshold": 0.5})


def test_reading_without_the_extension_names_the_op_and_the_cure(dynamic_ir: Path) -> None:
    with pytest.raises(RuntimeError, match="unsupported opset: edge") as caught:
        openvino.Core().read_model(dynamic_ir)
    explained = ov_kernels.explain_read_error(caught.value)
    assert isinstance(explained, ExtensionError)
    assert "op Threshold" in str(explained)
    assert "pip install" in (explained.hint or "")
