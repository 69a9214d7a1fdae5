"""CatsMlp where floats end: at a threshold, far out, near zero, and weights that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ov_kernels.mlp_blob import GatedMlp, Matrix, pack
from tests.kernels.test_cats_mlp import LAYOUTS, compile_op, expected, make_mlp, rms_error_of, tokens

pytestmark = pytest.mark.kernels


def bf16(values: NDArray[np.float32]) -> Matrix:
    return Matrix((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


def activations_only(ffn: int, activation: str) -> GatedMlp:
    """Return an MLP of hidden size ffn + 1 with y[j] = f(x[j]), if the last x is 1."""
    gate, up = (np.zeros((ffn, ffn + 1), np.float32) for _ in range(2))
    gate[:, :ffn] = np.eye(ffn)
    up[:, ffn] = 1
    return GatedMlp(bf16(gate), bf16(up), bf16(gate.T), activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
def test_an_activation_equal_to_its_threshold_is_dead(isa: str, activation: str) -> None:
    """<=, not <; and the next smaller threshold lets it live."""
    blob, ffn = pack(activations_only(100, activation)), 100
    x = np.append(np.linspace(-3, 3, ffn), 1).astype(np.float32)[None]
    a = np.abs(compile_op(blob, ffn + 1)(x)[0, :ffn])
    assert a.all()
    assert not compile_op(blob, ffn + 1, a)(x).any()
    below = np.nextafter(a, np.float32(0))
    np.testing.assert_array_equal(np.abs(compile_op(blob, ffn + 1, below)(x)[0, :ffn]), a)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
def test_activations_far_out(isa: str, activation: str) -> None:
    """With e^-x held at 2^127, SiLU of -1e38 came out as -0.5."""
    sizes = np.float32([1e2, 1e6, 1e12, 1e18, 1e30, 1e38])
    x = np.concatenate([-sizes, sizes, [1]]).astype(np.float32)[None]
    y = compile_op(pack(activations_only(12, activation)), 13)(x)[0]
    np.testing.assert_allclose(y[:6], 0, atol=1e-30)
    np.testing.assert_allclose(y[6:12], sizes, rtol=1e-2)  # bf16 ones are exact, the sizes are x's own


@pytest.mark.parametrize("form", ["i8", "u4"])
@pytest.mark.parametrize(("rows", "size", "bound"), [(1, 3e-18, 1e-2), (4, 2e-19, 0.5), (12, 2e-19, 0.5)])
def test_coefficients_near_the_least_float(isa: str, form: str, rows: int, size: float, bound: float) -> None:
    """A scale below 1 / 3.4e38 has no finite inverse: every coefficient became the largest negative integer.

    Coefficients are near 5e-36 and 2e-38, in steps of the least normal float, 1.2e-38: hence the bounds.
    """
    mlp, x = make_mlp(form, 128, 256), np.float32(size) * tokens(rows, 128)
    assert mlp.down.scale is not None
    mlp.down.scale[:] *= np.float16(1000)  # y itself stays clear of that end
    got = compile_op(pack(mlp), 128)(x)
    assert rms_error_of(np.float32(1e30) * got, 1e30 * expected(mlp, x)) <= bound


def test_weights_that_are_no_numbers_are_refused() -> None:
    """0 times an infinite weight, of a neuron dead for one token and alive for its neighbour, would be NaN."""
    mlp = make_mlp("i8", 128, 256)
    assert mlp.up.scale is not None
    mlp.up.scale[3] = np.inf
    with pytest.raises(ValueError, match="infinite or NaN"):
        pack(mlp)
    mlp = make_mlp("bf16", 128, 256)
    mlp.down.values[5, 7] = 0xFFC0
    with pytest.raises(ValueError, match="infinite or NaN"):
        pack(mlp)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "end"), [("i8", 127), ("i8", -128), ("u4", 15)])
def test_the_largest_products_do_not_overflow(isa: str, layout: str, form: str, end: int) -> None:
    """Every weight and every rounded activation is the largest there is: sums kept in 16 bits hold 8 words."""
    mlp = make_mlp(form, 256, 256)
    for matrix, value in ((mlp.gate, max(end, 15)), (mlp.up, end), (mlp.down, end)):  # SiLU wants a positive gate
        assert matrix.scale is not None and matrix.zero is not None
        matrix.values[:], matrix.scale[:], matrix.zero[:] = value, 2**-7, 0
    run, x = compile_op(pack(mlp, layout), 256), np.ones((17, 256), np.float32)
    for rows in (1, 2, 4, 8, 11, 16, 17):  # activations are all the same: rounding changes nothing
        assert rms_error_of(run(x[:rows]), expected(mlp, x[:rows])) <= 1e-5, f"{rows} rows"
