"""The op CatsMlp through OpenVINO's CPU plugin: the reference against numpy, every instruction set against the same.

numpy computes from the blob's own quantised values in f64, so what is left is the kernels' arithmetic: rounding of f32
sums in `exact`, else 16-bit activations for one or two tokens and 8-bit ones for more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray
from openvino import opset13
from openvino.utils.node_factory import NodeFactory

import ov_kernels
from ov_kernels.mlp_blob import LAYOUTS, GatedMlp, Matrix, pack, unpack

pytestmark = pytest.mark.kernels

EXACT = 1e-5
"""Bound on max |error| / max |y|: f32 sums."""
DECODE, PREFILL = 1e-4, 2e-2
"""Bounds on rms error / rms y: 16-bit activations; 8-bit activations and hidden values."""
SHAPES = {
    "i8": [(128, 256), (72, 50), (4, 3), (300, 1000)],
    "u4": [(128, 128), (384, 640)],
    "bf16": [(128, 256), (72, 50)],
}
DENSE, DEAD = -1.0, np.inf


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Each layout of weights in turn."""
    return str(request.param)


def make_matrix(form: str, rows: int, columns: int, random: np.random.Generator) -> Matrix:
    if form == "bf16":
        weights = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        return Matrix((weights.view(np.uint32) >> 16).astype(np.uint16))
    groups = 1 if form == "i8" else columns // 128
    low, high, kind = (-128, 128, np.int8) if form == "i8" else (0, 16, np.uint8)
    scale = random.uniform(0.5, 1.5, (rows, groups)) * columns**-0.5 * (2.0 / (high - low))
    zero = random.integers(-20, 20, (rows, groups)) if form == "i8" else random.integers(4, 12, (rows, groups))
    values = random.integers(low, high, (rows, columns)).astype(kind)
    return Matrix(values, scale.astype(np.float16), zero.astype(np.int8))


def make_mlp(form: str, hidden: int, ffn: int, seed: int = 0, activation: str = "silu") -> GatedMlp:
    random = np.random.default_rng(seed)
    gate, up = (make_matrix(form, ffn, hidden, random) for _ in range(2))
    return GatedMlp(gate, up, make_matrix(form, hidden, ffn, random), activation)


def compile_op(
    blob: NDArray[np.uint8], hidden: int, thresholds: Any = DENSE, exact: bool = False, threads: int | None = None
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    core = openvino.Core()
    ov_kernels.add_to(core, required=True)
    factory = NodeFactory()
    factory.add_extension(str(ov_kernels.library_path()))
    x = opset13.parameter([-1, hidden], np.float32)
    constants = [opset13.constant(blob), opset13.constant(np.atleast_1d(np.float32(thresholds)))]
    op = factory.create("CatsMlp", [x.output(0), *(c.output(0) for c in constants)], {"exact": exact})
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(openvino.Model([op.output(0)], [x]), "CPU", config)
    return lambda values: compiled([values])[0].copy()


def activated(g: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    from scipy.special import erf

    if activation == "silu":
        return g / (1 + np.exp(-g))
    inner = erf(g / np.sqrt(2)) if activation == "gelu_erf" else np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
    return 0.5 * g * (1 + inner)


def expected(mlp: GatedMlp, x: NDArray[np.float32], thresholds: Any = DENSE) -> NDArray[np.float64]:
    gate, up, down = (matrix.floats().astype(np.float64) for matrix in (mlp.gate, mlp.up, mlp.down))
    a = activated(x.astype(np.float64) @ gate.T, mlp.activation)
    a = np.where(np.abs(a) <= thresholds, 0, a)
    return (a * (x @ up.T)) @ down.T


def tokens(rows: int, hidden: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, hidden)).astype(np.float32)


def error_of(got: NDArray[np.float32], wanted: NDArray[np.float64]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def rms_error_of(got: NDArray[np.float32], wanted: NDArray[np.float64]) -> float:
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def clear_threshold(mlp: GatedMlp, x: NDArray[np.float32], share: float) -> float:
    """Return a threshold for which `share` of the activations are dead, in the widest gap near there.

    A value nearer to the threshold than the arithmetic's error may fall on either side of it.
    """
    a = np.sort(np.abs(activated(x.astype(np.float64) @ mlp.gate.floats().T, mlp.activation)), axis=None)
    begin = max(0, int(share * len(a)) - len(a) // 20)
    gaps = np.diff(a[begin : begin + max(2, len(a) // 10)])
    widest = begin + int(gaps.argmax())
    return float((a[widest] + a[widest + 1]) / 2)


@pytest.mark.parametrize(("form", "shape"), [(form, shape) for form in SHAPES for shape in SHAPES[form]])
def test_exact_op_equals_dense_with_mask(isa: str, layout: str, form: str, shape: tuple[int, int]) -> None:
    mlp, x = make_mlp(form, *shape), tokens(20, shape[0])
    for limit in (DENSE, clear_threshold(mlp, x, 0.5)):
        run = compile_op(pack(mlp, layout), shape[0], limit, exact=True)
        for rows in (1, 2, 3, 5, 7, 8, 9, 16, 20):
            assert error_of(run(x[:rows]), expected(mlp, x[:rows], limit)) <= EXACT, f"{rows} rows, limit {limit}"


@pytest.mark.parametrize(("form", "shape"), [("i8", (128, 256)), ("i8", (200, 130)), ("u4", (384, 640))])
def test_quantised_activations_stay_within_their_bound(
    isa: str, layout: str, form: str, shape: tuple[int, int]
) -> None:
    mlp, x = make_mlp(form, *shape), tokens(300, shape[0])
    run = compile_op(pack(mlp, layout), shape[0])
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 40, 300):
        bound = DECODE if rows <= 2 else PREFILL
        assert rms_error_of(run(x[:rows]), expected(mlp, x[:rows])) <= bound, f"{rows} rows"


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_dead_neurons_are_skipped(isa: str, layout: str, form: str, share: float) -> None:
    """Thresholds far from every activation: in 8 bits a neuron near one falls on either side."""
    mlp, x = make_mlp(form, 256, 512), tokens(12, 256)
    is_dead = np.random.default_rng(2).random(512) < share
    limits = np.where(is_dead, 100, DENSE).astype(np.float32)
    run = compile_op(pack(mlp, layout), 256, limits)
    for rows in (1, 5, 12):
        bound = DECODE if rows <= 2 else PREFILL
        assert rms_error_of(run(x[:rows]), expected(mlp, x[:rows], limits)) <= bound, f"{rows} rows"


@pytest.mark.parametrize("limit", [0.2, 0.2784, 0.2786, 0.35])
def test_thresholds_on_both_sides_of_the_least_silu(isa: str, layout: str, limit: float) -> None:
    """SiLU is never below -0.2785: from there on the threshold is one-sided."""
    mlp, x = make_mlp("i8", 256, 512), 2 * tokens(4, 256)
    got = compile_op(pack(mlp, layout), 256, limit, exact=True)(x)
    assert error_of(got, expected(mlp, x, limit)) <= EXACT


@pytest.mark.parametrize("form", SHAPES)
def test_all_dead_is_zero(isa: str, layout: str, form: str) -> None:
    run = compile_op(pack(make_mlp(form, 128, 256), layout), 128, DEAD)
    assert not any(run(tokens(rows, 128)).any() for rows in (1, 3, 16))


@pytest.mark.parametrize("form", SHAPES)
def test_one_neuron_alive(isa: str, layout: str, form: str) -> None:
    mlp, x = make_mlp(form, 128, 256), tokens(1, 128)
    limits = np.full(256, DEAD)
    limits[171] = -1
    got = compile_op(pack(mlp, layout), 128, limits, exact=True)(x)
    assert np.abs(got).max() > 0
    assert error_of(got, expected(mlp, x, limits)) <= EXACT


@pytest.mark.parametrize("form", SHAPES)
def test_each_neuron_has_its_own_threshold(isa: str, layout: str, form: str) -> None:
    mlp, x = make_mlp(form, 128, 384), tokens(2, 128)
    a = np.abs(activated(x.astype(np.float64) @ mlp.gate.floats().T, "silu"))
    limits = np.where(np.arange(384) % 3 == 0, a.max(0) * 1.01, a.min(0) * 0.99).astype(np.float32)
    got = compile_op(pack(mlp, layout), 128, limits, exact=True)(x)
    assert error_of(got, expected(mlp, x, limits)) <= EXACT


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_activations(isa: str, layout: str, activation: str, size: float) -> None:
    mlp = make_mlp("bf16", 64, 96, activation=activation)
    x = np.float32(size) * tokens(3, 64)
    with np.errstate(over="ignore"):
        wanted = expected(mlp, x)
    assert error_of(compile_op(pack(mlp, layout), 64)(x), wanted) <= EXACT


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_a_nan_reaches_its_own_row_only(isa: str, layout: str, form: str, rows: int, bad: float, exact: bool) -> None:
    """It wakes all neurons. Where those share scales, the clean step must wake all too for the same bits."""
    shares_scales = rows == 3 and not exact and form != "bf16"
    mlp, x = make_mlp(form, 128, 256), tokens(rows, 128)
    op = compile_op(pack(mlp, layout), 128, 0.0 if shares_scales else 0.05, exact=exact)
    clean = op(x)
    x[rows // 2, 77] = bad
    got = op(x)
    assert np.isnan(got[rows // 2]).all()
    others = np.arange(rows) != rows // 2
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("form", ["i8", "u4"])
def test_what_a_token_wakes_costs_another_no_more_than_rounding(isa: str, layout: str, form: str) -> None:
    mlp, x = make_mlp(form, 128, 256), tokens(3, 128)
    op = compile_op(pack(mlp, layout), 128, 0.05)
    clean = op(x)
    x[1, 77] = np.nan
    assert rms_error_of(op(x)[[0, 2]], clean[[0, 2]].astype(np.float64)) <= PREFILL


def test_no_tokens(isa: str, layout: str) -> None:
    assert compile_op(pack(make_mlp("i8", 128, 256), layout), 128)(tokens(0, 128)).shape == (0, 128)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("form", SHAPES)
def test_result_does_not_depend_on_threads(isa: str, layout: str, form: str, rows: int) -> None:
    mlp, x = make_mlp(form, 256, 2048), tokens(rows, 256)
    blob, limit = pack(mlp, layout), clear_threshold(mlp, x, 0.5)
    first, *others = [compile_op(blob, 256, limit, threads=threads)(x) for threads in (1, 2, 2)]
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_exact_rows_do_not_depend_on_their_neighbours(isa: str, layout: str, form: str, rows: int) -> None:
    """Greedy text with a draft equals greedy text without one only if a row of a block is what it is alone."""
    mlp, x = make_mlp(form, 256, 1024), tokens(rows, 256)
    run = compile_op(pack(mlp, layout), 256, clear_threshold(mlp, x, 0.5), exact=True)
    np.testing.assert_array_equal(run(x), np.concatenate([run(row[None]) for row in x]))


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("rows", [2, 3, 8, 11, 16])
def test_rows_of_tiles_do_not_depend_on_their_neighbours(isa: str, form: str, rows: int) -> None:
    mlp, x = make_mlp(form, 256, 1024), tokens(rows, 256)
    run = compile_op(pack(mlp, "tiles"), 256)
    other = tokens(rows, 256, seed=2)
    other[rows - 1] = x[0]
    np.testing.assert_array_equal(run(other)[rows - 1], run(x)[0])


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("shape", [(128, 256), (72, 50)])
def test_packing_keeps_every_value(layout: str, form: str, shape: tuple[int, int]) -> None:
    if form == "u4" and shape[0] % 128:
        pytest.skip("4 bits come in groups of 128")
    mlp = make_mlp(form, *shape, activation="gelu_erf")
    back = unpack(pack(mlp, layout))
    assert back.activation == "gelu_erf"
    for one, other in zip((mlp.gate, mlp.up, mlp.down), (back.gate, back.up, back.down), strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.floats(), other.floats())


def with_field(blob: NDArray[np.uint8], offset: int, value: int) -> NDArray[np.uint8]:
    """Return the blob with another word in its header, and the checksum that goes with it."""
    spoilt = blob.copy()
    spoilt[offset : offset + 4] = np.frombuffer(np.uint32(value).tobytes(), np.uint8)
    spoilt[60:64] = np.frombuffer(np.uint32(zlib.crc32(spoilt[:60])).tobytes(), np.uint8)
    return spoilt


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda blob: blob[:40], "shorter than a header"),
        (lambda blob: np.concatenate([np.frombuffer(b"SOMETHIN", np.uint8), blob[8:]]), "do not begin with EDGE-MLP"),
        (lambda blob: np.concatenate([blob[:20], blob[20:21] + 1, blob[21:]]), "header is damaged"),
        (lambda blob: with_field(blob, 8, 1), "another version than 2"),
        (lambda blob: with_field(blob, 28, 2), "format, activation or layout is unknown"),
        (lambda blob: with_field(blob, 28, 1), "another size than their shape needs"),
        (lambda blob: blob[:-64], "another size"),
        (lambda blob: np.concatenate([blob, blob[:64]]), "another size"),
    ],
)
def test_a_foreign_or_damaged_blob_is_refused(spoil: Callable[[Any], Any], says: str) -> None:
    """A blob that is shorter than its shape would be read past its end."""
    with pytest.raises(RuntimeError, match=says):
        compile_op(spoil(pack(make_mlp("i8", 128, 256))), 128)


def test_a_wrong_number_of_thresholds_is_refused() -> None:
    with pytest.raises(RuntimeError, match="got 2 thresholds, expected 1 or 256"):
        compile_op(pack(make_mlp("i8", 128, 256)), 128, [0.1, 0.2])


def test_unknown_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running others in silence would time or test the wrong ones; an error of the running op is lost on one thread."""
    monkeypatch.setenv("EDGE_KERNELS_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="EDGE_KERNELS_ISA names instructions that this machine does not have"):
        compile_op(pack(make_mlp("i8", 128, 256)), 128, threads=1)
