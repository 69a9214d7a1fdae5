"""What the op CatsMlp brings on one gated MLP: time by rows and sparsity, beside OpenVINO's own kernels.

    openvino  the MLP in standard ops with the same quantised weights, in the fastest of several settings
    dense     the op with weights in tiles, which are read whole
    cats      the op with weights in records, and thresholds that make a share of the activations dead (CATS, arXiv
              2404.08763)

Weights and inputs are random, so the tokens of one step are independent and share as few live neurons as chance gives:
the worst case for several rows. All variants run in turn on fresh inputs, and each one's weights exceed the caches.

Roofline: bytes of weights that must be read / bandwidth of a plain read in the same run. It bounds few rows; with
hundreds of them arithmetic does.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bench.settings import CatsSettings

CALIBRATION_TOKENS = 64
WARM_UP = 2
MANY_ROWS = 64
"""From here on one run takes long enough for a third of the rounds."""
MAX_DECODE_ROWS = 8
"""Rows up to which the op skips rows of weights; more read all."""

Run = Callable[[NDArray[np.float32]], None]


@dataclass(frozen=True)
class _Variant:
    impl: str
    sparsity: float
    setting: str
    run: Run


class CatsBench:
    """Measures all cells.

    Raises:
        ExtensionError: The compiled library is not installed.
    """

    def __init__(self, settings: CatsSettings) -> None:
        self._settings = settings
        self._bytes_read = byte_counter()
        self._bandwidth = read_bandwidth()
        self._rows: list[dict[str, Any]] = []

    @property
    def num_cells(self) -> int:
        """Combinations of weights and rows: what `run` yields."""
        return len(self._settings.weights) * len(self._settings.rows)

    def run(self) -> Iterator[None]:
        """Measure; yield after each combination of weights and rows."""
        for weights in self._settings.weights:
            blob_bytes, variants = _variants(weights, self._settings)
            for rows in self._settings.rows:
                self._measure(weights, blob_bytes, variants, rows)
                yield

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished rows: of OpenVINO's settings the fastest one."""
        return self._rows

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a plain read by all cores."""
        return self._bandwidth

    def _measure(self, weights: str, blob_bytes: int, variants: list[_Variant], rows: int) -> None:
        random = np.random.default_rng(rows)
        rounds = self._settings.rounds if rows < MANY_ROWS else max(3, self._settings.rounds // 3)
        times: list[list[float]] = [[] for _ in variants]
        touched = [0] * len(variants)
        for _ in range(WARM_UP + rounds):
            for index, variant in enumerate(variants):
                x = random.standard_normal((rows, self._settings.hidden), dtype=np.float32)
                before, begin = self._bytes_read(), time.perf_counter()
                variant.run(x)
                times[index].append(1000 * (time.perf_counter() - begin))
                touched[index] = self._bytes_read() - before
        made = [
            self._row(weights, rows, variant, spent[WARM_UP:], read or blob_bytes)
            for variant, spent, read in zip(variants, times, touched, strict=True)
        ]
        stock = min((row for row in made if row["impl"] == "openvino"), key=lambda row: row["ms"])
        self._rows += [stock, *(row for row in made if row["impl"] != "openvino")]

    def _row(self, weights: str, rows: int, variant: _Variant, times: list[float], read: int) -> dict[str, Any]:
        low, middle, high = np.quantile(times, (0.1, 0.5, 0.9))
        return {
            "impl": variant.impl,
            "weights": weights,
            "hidden": self._settings.hidden,
            "ffn": self._settings.ffn,
            "rows": rows,
            "sparsity": variant.sparsity,
            "ms": round(float(middle), 4),
            "ms_p10": round(float(low), 4),
            "ms_p90": round(float(high), 4),
            "bytes_touched": read,
            "roofline_ms": round(1000 * read / self._bandwidth, 4),
            "setting": variant.setting,
        }


def read_bandwidth() -> float:
    """Return bytes per second of a plain read of 1 GB by all cores; the best of five."""
    shares = np.array_split(np.ones(1 << 27), os.cpu_count() or 1)
    best = 0.0
    with ThreadPoolExecutor(len(shares)) as threads:
        for _ in range(5):
            begin = time.perf_counter()
            list(threads.map(np.max, shares))
            best = max(best, 8 * (1 << 27) / (time.perf_counter() - begin))
    return best


def random_mlp(weights: str, hidden: int, ffn: int) -> Any:
    """Return a GatedMlp of normal random weights: bf16, or in the form that NNCF's symmetric modes give."""
    from ov_kernels.mlp_blob import GatedMlp

    random = np.random.default_rng(0)
    gate, up = (_random_matrix(weights, ffn, hidden, random) for _ in range(2))
    return GatedMlp(gate, up, _random_matrix(weights, hidden, ffn, random))


def _random_matrix(weights: str, rows: int, columns: int, random: np.random.Generator) -> Any:
    from ov_kernels.mlp_blob import BLOCK, Matrix

    if weights == "bf16":
        values = random.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        return Matrix((values.view(np.uint32) >> 16).astype(np.uint16))
    levels, groups = (256, 1) if weights == "int8" else (16, columns // BLOCK)
    values = np.empty((rows, columns), np.int8)
    for row in values:
        row[:] = np.clip(
            np.rint(random.standard_normal(columns, np.float32) * levels / 8), -levels // 2, levels // 2 - 1
        )
    scale = np.full((rows, groups), 8 / levels / columns**0.5, np.float16)
    if weights == "int8":
        return Matrix(values, scale, np.zeros((rows, groups), np.int8))
    return Matrix((values + 8).astype(np.uint8), scale, np.full((rows, groups), 8, np.int8))


def _variants(weights: str, settings: CatsSettings) -> tuple[int, list[_Variant]]:
    """Return the bytes of the MLP's weights and all ways to compute it."""
    from ov_kernels.mlp_blob import pack

    mlp = random_mlp(weights, settings.hidden, settings.ffn)
    tiles, records = (_mapped(pack(mlp, layout)) for layout in ("tiles", "records"))
    made = [_Variant("openvino", 0.0, name, run) for name, run in _stock_runs(mlp, settings.hidden)]
    made.append(_Variant("dense", 0.0, "", _fused_run(tiles, settings.hidden, -1.0)))
    sizes = _activation_sizes(mlp, settings.hidden)
    for share in settings.sparsity:
        threshold = float(np.quantile(sizes, share)) if share else -1.0
        made.append(_Variant("cats", share, "", _fused_run(records, settings.hidden, threshold)))
    return tiles.nbytes, made


def _mapped(blob: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the same bytes in pages of a file, as a model's are: where those are large, 5 to 10 % faster."""
    with tempfile.TemporaryFile() as file:
        blob.tofile(file)
        file.flush()
        return np.memmap(file, mode="c")  # a constant wants to be writable


def _activation_sizes(mlp: Any, hidden: int) -> NDArray[np.float32]:
    """Return |SiLU(x gate)| of random tokens."""
    x = np.random.default_rng(1).standard_normal((CALIBRATION_TOKENS, hidden), dtype=np.float32)
    g: NDArray[np.float32] = x @ mlp.gate.floats().T
    sizes: NDArray[np.float32] = np.abs(g / (1 + np.exp(-g)))
    return sizes


def _stock_runs(mlp: Any, hidden: int) -> Iterator[tuple[str, Run]]:
    from edge_runtime.devices import core
    from edge_runtime.models.passes.fused_mlp import standard_ops

    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "f32": {"INFERENCE_PRECISION_HINT": "f32"},
        "activations in groups of 128": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128},
    }
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        settings["bf16, no dynamic quantisation"] = properties
    for name, properties in settings.items():
        yield name, _compiled(lambda x: standard_ops(mlp, x, np.array([-1], np.float32)), hidden, properties)


def _fused_run(blob: NDArray[np.uint8], hidden: int, threshold: float) -> Run:
    from openvino import opset13

    import ov_kernels

    def op(x: Any) -> Any:
        constants = (opset13.constant(blob, shared_memory=True), opset13.constant(np.array([threshold], np.float32)))
        inputs = [x, *(constant.output(0) for constant in constants)]
        return ov_kernels.create("CatsMlp", inputs, {"exact": False}).output(0)

    return _compiled(op, hidden, {})


def _compiled(make: Callable[[Any], Any], hidden: int, properties: dict[str, Any]) -> Run:
    """Compile a graph of one input [rows, hidden]; return how to run it."""
    import openvino as ov
    from openvino import opset13

    import ov_kernels
    from edge_runtime.devices import core
    from edge_runtime.models.compiling import compile_model

    ov_kernels.add_to(core(), required=True)
    x = opset13.parameter([-1, hidden], np.float32)
    request = compile_model(ov.Model([make(x.output(0))], [x]), "CPU", properties).create_infer_request()

    def run(values: NDArray[np.float32]) -> None:
        request.set_input_tensor(ov.Tensor(values))
        request.start_async()  # several times cheaper than infer(), which pins the thread
        request.wait()

    return run


def byte_counter() -> Callable[[], int]:
    """Return how to ask the library for the bytes of weights that the op has read in decoding."""
    import ov_kernels

    function = ov_kernels.exported("edge_cats_mlp_bytes_read")
    function.restype = ctypes.c_uint64
    return lambda: int(function())
