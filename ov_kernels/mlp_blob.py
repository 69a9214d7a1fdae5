"""The weights of one gated MLP as the one blob that the op CatsMlp reads; src/cats_mlp/cats_mlp.hpp has the layout.

    blob = pack(GatedMlp(gate, up, down, "silu"), "tiles")     # uint8 [bytes]
    unpack(blob).gate.values                                   # the same quantised values again

Values are kept as they were quantised: a model whose MLPs became blobs computes what it did before, up to rounding.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"EDGE-MLP", 2
HEADER = struct.Struct("<8s6IQ20x")
FORMATS = ("i8", "u4", "bf16")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
LAYOUTS = ("records", "tiles")
"""Layouts of weights: neuron by neuron, to be skipped; or 16 rows abreast, to be read whole, which is faster."""
BLOCK = 128
"""Columns, and in 4 bits neurons, that share a scale; rows are padded to whole blocks."""
TILE, WORD = 16, 4
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


def pack(mlp: GatedMlp, layout: str = "records") -> NDArray[np.uint8]:
    """Return the blob of an MLP.

    Args:
        mlp: Its weights.
        layout: `records` for an MLP whose thresholds leave neurons dead, `tiles` for one without.

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
    body = b"".join(_aligned(section) for section in (_records(mlp) if layout == "records" else _tiles(mlp)))
    header = _header(mlp, hidden, ffn, LAYOUTS.index(layout), len(body))
    return np.frombuffer(bytearray(header + body), np.uint8)


def layout_of(blob: NDArray[np.uint8]) -> str:
    """Return a blob's layout."""
    return LAYOUTS[HEADER.unpack(blob[: HEADER.size].tobytes())[6]]


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
    _, version, form, activation, hidden, ffn, layout, size = HEADER.unpack(content[: HEADER.size].tobytes())
    if version != VERSION or size != len(content):
        raise ValueError(f"the blob has version {version} and {len(content)} bytes, expected {VERSION} and {size}")
    read = _read_records if LAYOUTS[layout] == "records" else _read_tiles
    gate, up, down = read(_Sections(content), FORMATS[form], hidden, ffn, neurons or ffn)
    return GatedMlp(gate, up, down, ACTIVATIONS[activation])


def _records(mlp: GatedMlp) -> list[NDArray[Any]]:
    """Return the sections of gate tiles and records."""
    padding = np.zeros((len(mlp.gate.values), RECORD_PADDING), np.uint8)
    records = np.concatenate([_rows(mlp.up.values), _rows(mlp.down.values.T), padding], 1)
    sections = [_tiled(mlp.gate), records, *_tiled_scales(mlp.gate)]
    if mlp.up.scale is not None and mlp.up.zero is not None:
        sections += [mlp.up.scale, mlp.up.zero]
    if mlp.down.scale is not None and mlp.down.zero is not None:
        sections += [_padded(part.T) for part in (mlp.down.scale, mlp.down.zero)]
    return sections


def _tiles(mlp: GatedMlp) -> list[NDArray[Any]]:
    """Return the sections of tiles: weights of the three matrices, then their scales."""
    matrices = (mlp.gate, mlp.up, mlp.down)
    return [*map(_tiled, matrices), *(part for matrix in matrices for part in _tiled_scales(matrix))]


def _tiled(matrix: Matrix) -> NDArray[Any]:
    rows = _rows(np.pad(matrix.values, ((0, -len(matrix.values) % TILE), (0, 0))))
    return rows.reshape(-1, TILE, rows.shape[1] // WORD, WORD).transpose(0, 2, 1, 3)


def _tiled_scales(matrix: Matrix) -> list[NDArray[Any]]:
    parts = [part for part in (matrix.scale, matrix.zero) if part is not None]
    padded = [np.pad(part, ((0, -len(part) % TILE), (0, 0))) for part in parts]
    return [part.reshape(-1, TILE, part.shape[1]).transpose(0, 2, 1) for part in padded]


def _read_records(take: _Sections, form: str, hidden: int, ffn: int, kept: int) -> list[Matrix]:
    columns = -(-hidden // BLOCK) * BLOCK
    width, groups, down_groups = _row_bytes(form, hidden), _groups(form, columns), _groups(form, ffn)
    gate = _read_tiled(take, form, (ffn, hidden), (kept, hidden))
    records = take(np.uint8, ffn, 2 * width + RECORD_PADDING)[:kept]
    gate_scales = _read_tiled_scales(take, form, (ffn, hidden), (kept, hidden))
    up_scales = [take(kind, ffn, groups)[:kept] for kind in (np.float16, np.int8)]
    most = min(down_groups, -(-kept // BLOCK))
    down_scales = [take(kind, down_groups, columns)[:most, :hidden].T for kind in (np.float16, np.int8)]
    up, down = (_values(rows, form)[:, :hidden] for rows in (records[:, :width], records[:, width : 2 * width]))
    parts: list[list[Any]] = [gate_scales, up_scales, down_scales] if groups else [[None, None]] * 3
    return [Matrix(values, *pair) for values, pair in zip((gate, up, down.T), parts, strict=True)]


def _read_tiles(take: _Sections, form: str, hidden: int, ffn: int, kept: int) -> list[Matrix]:
    shapes = [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    limits = [(kept, hidden), (kept, hidden), (hidden, kept)]
    values = [_read_tiled(take, form, shape, limit) for shape, limit in zip(shapes, limits, strict=True)]
    parts = [_read_tiled_scales(take, form, shape, limit) for shape, limit in zip(shapes, limits, strict=True)]
    return [Matrix(one, *pair) for one, pair in zip(values, parts, strict=True)]


def _read_tiled(take: _Sections, form: str, shape: tuple[int, int], limit: tuple[int, int]) -> NDArray[Any]:
    """Return the first `limit` rows and columns of a matrix of `shape`."""
    width = _row_bytes(form, shape[1])
    words = take(np.uint8, -(-shape[0] // TILE), TILE * width).reshape(-1, width // WORD, TILE, WORD)
    rows = words[: -(-limit[0] // TILE)].transpose(0, 2, 1, 3).reshape(-1, width)
    return _values(rows, form)[: limit[0], : limit[1]]


def _read_tiled_scales(take: _Sections, form: str, shape: tuple[int, int], limit: tuple[int, int]) -> list[Any]:
    groups, most = _groups(form, shape[1]), _groups(form, -(-limit[1] // BLOCK) * BLOCK)
    if groups == 0:
        return [None, None]
    pair = [take(kind, -(-shape[0] // TILE), groups * TILE) for kind in (np.float16, np.int8)]
    rows = [part.reshape(-1, groups, TILE).transpose(0, 2, 1).reshape(-1, groups) for part in pair]
    return [part[: limit[0], :most] for part in rows]


def _row_bytes(form: str, columns: int) -> int:
    return -(-columns // BLOCK) * {"i8": BLOCK, "u4": BLOCK // 2, "bf16": 2 * BLOCK}[form]


def _groups(form: str, columns: int) -> int:
    """Return how many scales a row has."""
    return {"i8": 1, "u4": columns // BLOCK, "bf16": 0}[form]


class _Sections:
    """Reads a blob's sections, one after another."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self._content, self._next = content, ALIGNMENT

    def __call__(self, kind: type, rows: int, columns: int) -> NDArray[Any]:
        values: NDArray[Any] = np.frombuffer(self._content, kind, rows * columns, self._next).reshape(rows, columns)
        self._next += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        return values


def _header(mlp: GatedMlp, hidden: int, ffn: int, layout: int, size: int) -> bytes:
    form, activation = FORMATS.index(mlp.gate.format), ACTIVATIONS.index(mlp.activation)
    fields = HEADER.pack(MAGIC, VERSION, form, activation, hidden, ffn, layout, ALIGNMENT + size)
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
