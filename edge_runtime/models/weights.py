"""How the matrices of a graph are stored: what decides in which arithmetic, and in which groups, it runs fastest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.light_openvino import ov

_KINDS = {
    ov.Type.u4: "int4",
    ov.Type.i4: "int4",
    ov.Type.u8: "int8",
    ov.Type.i8: "int8",
    ov.Type.bf16: "16-bit",
    ov.Type.f16: "16-bit",
    ov.Type.f32: "f32",
}
KINDS = ("int4", "int8", "16-bit", "f32")
FLOATS = ("16-bit", "f32")
_DECOMPRESSION = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
"""What may stand between a stored matrix and the product that it is for."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one model.

    Attributes:
        num_bytes: Size of the file.
        kind: How most of them are stored: `int4`, `int8`, `16-bit` or `f32`.
        group_size: Smallest group of int4 weights along the input axis; None where there are no such groups.
        has_floats: Whether any matrix is stored in 16 or 32 bits.
    """

    num_bytes: int
    kind: str = "f32"
    group_size: int | None = None
    has_floats: bool = True


def weights_of(model: ov.Model, num_bytes: int = 0) -> Weights:
    """Return the facts about a graph's weights."""
    sizes: Counter[str] = Counter()
    groups: list[int] = []
    for node in model.get_ops():
        name = node.get_type_name()
        if name == "MatMul":
            sizes.update(dict(_matrices(node)))
        elif name == "Constant" and node.get_output_element_type(0) in (ov.Type.u4, ov.Type.i4):
            shape = node.get_output_shape(0)
            if len(shape) == 3 and shape[2] > 1:  # zero points are 4-bit too, one a group
                groups.append(shape[2])
    kind = max(sizes, key=lambda kind: sizes[kind], default="f32")
    return Weights(
        num_bytes=num_bytes,
        kind=kind,
        group_size=min(groups, default=None),
        has_floats=any(sizes[kind] for kind in FLOATS),
    )


def _matrices(product: ov.Node) -> Iterator[tuple[str, int]]:
    """Yield kind and size of the stored matrices that a product multiplies by."""
    for port in product.input_values():
        node = port.get_node()
        while node.get_type_name() in _DECOMPRESSION:
            node = node.input_value(0).get_node()
        if node.get_type_name() != "Constant":
            continue
        kind, shape = _KINDS.get(node.get_output_element_type(0)), node.get_output_shape(0)
        # The walk also meets the factors of norms and rotary embeddings, whose floats have one axis or three.
        if kind and (len(shape) == 2 or (kind not in FLOATS and len(shape) > 2)):
            yield kind, math.prod(shape)
