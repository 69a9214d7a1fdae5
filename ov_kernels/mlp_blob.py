"""The weights of one gated MLP as the one blob that the op CatsMlp reads; src/cats_mlp/cats_mlp.hpp has the layout.

    blob = pack(GatedMlp(gate, up, down, "silu"))     # uint8 [bytes]
    unpack(blob).gate.values                          # the same quantised values again

Values are kept as they were quantised: a model whose MLPs became blobs computes what it did before, up to rounding.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"EDGE-MLP", 1
HEADER = struct.Struct("<8s6IQ20x")
FORMATS = ("i8", "u4", "bf16")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
BLOCK = 128
"""Columns, and in 4 bits neurons, that share a scale; rows are padded to whole blocks."""
ALIGNMENT = RECORD_PADDING = 64


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix: scale * (values - zero).

    Attributes:
        values: (rows, columns): int8, uint8 of 0 to 15 (u4), or uint16 that hold bf16.
        scale: float16 (rows, groups); groups is 1 for int8 and columns / 128 for u4. None for bf16.
        zero: int8 of the same shape. None for bf16.
    """

    values: NDArray[Any]
    scale: NDArray[np.float16] | None = None
    zero: NDArray[np.int8] | None = None

    @property
    def format(self) -> str:
        """`i8`, `u4` or `bf16`."""
        return {"int8": "i8", "uint8": "u4", "uint16": "bf16"}[self.values.dtype.name]

    def floats(self) -> NDArray[np.float32]:
        """Return the weights as f32."""
        if self.scale is None or self.zero is None:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        width = self.values.shape[1] // self.scale.shape[1]
        zero, scale = (np.repeat(part.astype(np.float32), width, 1) for part in (self.zero, self.scale))
        return scale * (self.values.astype(np.float32) - zero)


@dataclass(frozen=True)
class GatedMlp:
    """y = (f(x gate^T) * (x up^T)) down^T, as Hugging Face stores it.

    Attributes:
        gate: (F, H).
        up: (F, H).
        down: (H, F).
        activation: f: `silu`, `gelu_tanh` or `gelu_erf`.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: str = "silu"


def pack(mlp: GatedMlp) -> NDArray[np.uint8]:
    """Return the blob of an MLP.

    Raises:
        ValueError: The matrices' formats differ, 4-bit sizes are no multiples of 128, or a scale or a bf16 weight is
            not finite.
    """
    form, (ffn, hidden) = mlp.gate.format, mlp.gate.values.shape
    if {mlp.up.format, mlp.down.format} != {form}:
        raise ValueError(f"formats are {form}, {mlp.up.format} and {mlp.down.format}, expected the same")
    if form == "u4" and (ffn % BLOCK or hidden % BLOCK):
        raise ValueError(f"sizes are {hidden} and {ffn}, expected multiples of {BLOCK} for 4 bits")
    if not all(map(_is_finite, (mlp.gate, mlp.up, mlp.down))):
        raise ValueError("a scale or weight is infinite or NaN, expected finite numbers")
    padding = np.zeros((ffn, RECORD_PADDING), np.uint8)
    records = np.concatenate([_rows(mlp.up.values), _rows(mlp.down.values.T), padding], 1)
    sections = [_rows(mlp.gate.values), records]
    for matrix in (mlp.gate, mlp.up):
        if matrix.scale is not None and matrix.zero is not None:
            sections += [matrix.scale, matrix.zero]
    if mlp.down.scale is not None and mlp.down.zero is not None:
        sections += [_padded(part.T) for part in (mlp.down.scale, mlp.down.zero)]
    body = b"".join(_aligned(section) for section in sections)
    return np.frombuffer(bytearray(_header(mlp, hidden, ffn, len(body)) + body), np.uint8)


def unpack(blob: NDArray[np.uint8], neurons: int | None = None) -> GatedMlp:
    """Return the MLP that a blob was packed from.

    Args:
        blob: From `pack`.
        neurons: Leave out those after so many, in 4 bits a multiple of 128.

    Raises:
        ValueError: It is not a whole blob of this version.
    """
    content = np.ascontiguousarray(blob)
    if content[: len(MAGIC)].tobytes() != MAGIC or len(content) < ALIGNMENT:
        raise ValueError("the blob does not begin with EDGE-MLP")
    _, version, form, activation, hidden, ffn, _, size = HEADER.unpack(content[: HEADER.size].tobytes())
    if version != VERSION or size != len(content):
        raise ValueError(f"the blob has version {version} and {len(content)} bytes, expected {VERSION} and {size}")
    columns, take = -(-hidden // BLOCK) * BLOCK, _Sections(content)
    width = {"i8": columns, "u4": columns // 2, "bf16": 2 * columns}[FORMATS[form]]
    groups, down_groups = {"i8": (1, 1), "u4": (columns // BLOCK, ffn // BLOCK), "bf16": (0, 0)}[FORMATS[form]]
    kept, kept_groups = (ffn, down_groups) if neurons is None else (neurons, min(down_groups, -(-neurons // BLOCK)))
    gate, records = take(np.uint8, ffn, width)[:kept], take(np.uint8, ffn, 2 * width + RECORD_PADDING)[:kept]
    scales = [(take(np.float16, ffn, groups)[:kept], take(np.int8, ffn, groups)[:kept]) for _ in range(2)]
    down = [take(kind, down_groups, columns)[:kept_groups, :hidden].T for kind in (np.float16, np.int8)]
    values = [
        _values(rows, FORMATS[form])[:, :hidden] for rows in (gate, records[:, :width], records[:, width : 2 * width])
    ]
    parts = [scales[0], scales[1], (down[0], down[1])] if groups else [(None, None)] * 3
    return GatedMlp(
        Matrix(values[0], *parts[0]), Matrix(values[1], *parts[1]), Matrix(values[2].T, *parts[2]),
        ACTIVATIONS[activation],
    )  # fmt: skip


class _Sections:
    """Reads a blob's sections, one after another."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self._content, self._next = content, ALIGNMENT

    def __call__(self, kind: type, rows: int, columns: int) -> NDArray[Any]:
        values: NDArray[Any] = np.frombuffer(self._content, kind, rows * columns, self._next).reshape(rows, columns)
        self._next += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        return values


def _header(mlp: GatedMlp, hidden: int, ffn: int, size: int) -> bytes:
    form, activation = FORMATS.index(mlp.gate.format), ACTIVATIONS.index(mlp.activation)
    fields = HEADER.pack(MAGIC, VERSION, form, activation, hidden, ffn, 0, ALIGNMENT + size)
    return fields + struct.pack("<I", zlib.crc32(fields))


def _is_finite(matrix: Matrix) -> bool:
    """Tell whether all weights are numbers: 0 times an infinite one, of a dead neuron, would not be 0."""
    if matrix.scale is not None:
        return bool(np.isfinite(matrix.scale).all())
    return bool(((matrix.values & 0x7F80) != 0x7F80).all())


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    return np.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK)))


def _rows(values: NDArray[Any]) -> NDArray[Any]:
    """Return rows of weights as stored bytes."""
    whole = np.ascontiguousarray(_padded(values))
    if values.dtype != np.uint8:
        return whole.view(np.uint8)
    blocks = whole.reshape(len(whole), -1, 2, BLOCK // 2).astype(np.uint8)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(len(whole), -1)


def _values(rows: NDArray[Any], form: str) -> NDArray[Any]:
    """Return stored bytes as rows of weights: the inverse of _rows."""
    if form != "u4":
        return np.ascontiguousarray(rows).view(np.int8 if form == "i8" else np.uint16)
    blocks = rows.reshape(len(rows), -1, BLOCK // 2)
    return np.stack([blocks & 15, blocks >> 4], 2).reshape(len(rows), -1)


def _aligned(section: NDArray[Any]) -> bytes:
    content = np.ascontiguousarray(section).tobytes()
    return content + bytes(-len(content) % ALIGNMENT)
