"""The memory of a pool's blocks: tensors that we own and that the plugin reads and writes in place.

Blocks are the outermost axis of each tensor, so that a block is moved, copied or written to a file as plain bytes,
whatever the layout and the precision within it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.devices import core
from edge_runtime.errors import DeviceError

CACHE_ALIGNMENT = 64
"""Bytes of a cache line, which a vector load should not cross."""
Blocks = NDArray[np.integer[Any]]
"""Numbers of blocks."""


class Memory(Protocol):
    """The tensors of one pool.

    Attributes:
        block_bytes: Bytes of one block in all tensors.
        layout: Element type and shape of a block in each tensor.
        can_move: Whether `resize` may renumber blocks.
    """

    block_bytes: int
    layout: list[str]
    can_move: bool

    def resize(self, num_blocks: int, kept: Blocks) -> None:
        """Have `num_blocks` blocks, of which number i is what `kept[i]` was. Where it raises, nothing has changed."""

    def copy(self, sources: Blocks, targets: Blocks) -> None:
        """Copy blocks over others."""

    def read(self, blocks: Blocks) -> list[NDArray[np.uint8]]:
        """Return a copy of blocks, (n, bytes) for each tensor."""

    def write(self, blocks: Blocks, content: NDArray[np.uint8]) -> int:
        """Fill blocks with the bytes of what `read` returned, one tensor after the other; return how many they are."""


class HostMemory:
    """Memory of the process, which the system gives page by page as it is used; implements `Memory`.

    Args:
        request: Whose inputs the tensors are.
        ports: Inputs of the compiled model, blocks outermost and of unknown number.
    """

    can_move = True

    def __init__(self, request: ov.InferRequest, ports: Sequence[ov.ConstOutput]) -> None:
        self._request, self._ports = request, ports
        self._sizes = [math.prod(_block_shape(port)) * port.get_element_type().bitwidth // 8 for port in ports]
        self.block_bytes, self.layout = sum(self._sizes), _layout(ports)
        self._memory = [aligned_bytes(0).reshape(0, size) for size in self._sizes]

    def resize(self, num_blocks: int, kept: Blocks) -> None:
        """Have `num_blocks` blocks, of which number i is what `kept[i]` was. Where it raises, nothing has changed."""
        new = [aligned_bytes(num_blocks * size).reshape(-1, size) for size in self._sizes]
        for number, (port, target) in enumerate(zip(self._ports, new, strict=True)):
            # One tensor after the other: pages are taken here, and those of the old tensor given back.
            np.take(self._memory[number], kept, axis=0, out=target[: len(kept)], mode="clip")
            shape = ov.Shape([num_blocks, *_block_shape(port)])
            self._request.set_tensor(port, ov.Tensor(target.reshape(-1), shape, port.get_element_type()))
            self._memory[number] = target

    def copy(self, sources: Blocks, targets: Blocks) -> None:
        """Copy blocks over others."""
        for tensor in self._memory:
            tensor[targets] = tensor[sources]

    def read(self, blocks: Blocks) -> list[NDArray[np.uint8]]:
        """Return a copy of blocks, (n, bytes) for each tensor."""
        return [tensor[blocks] for tensor in self._memory]

    def write(self, blocks: Blocks, content: NDArray[np.uint8]) -> int:
        """Fill blocks with the bytes of what `read` returned, one tensor after the other; return how many they are."""
        begin = 0
        for tensor in self._memory:
            end = begin + len(blocks) * tensor.shape[1]
            tensor[blocks] = content[begin:end].reshape(len(blocks), -1)
            begin = end
        return begin


class DeviceMemory:
    """Memory of a GPU, whose blocks keep their numbers; implements `Memory`.

    Args:
        request: Whose inputs the tensors are.
        ports: Inputs of the compiled model, blocks outermost and of unknown number.
        device: OpenVINO device.
    """

    can_move = False

    def __init__(self, request: ov.InferRequest, ports: Sequence[ov.ConstOutput], device: str) -> None:
        self._request, self._ports, self._device = request, ports, device
        sizes = [math.prod(_block_shape(port)) * port.get_element_type().bitwidth // 8 for port in ports]
        self.block_bytes, self.layout = sum(sizes), _layout(ports)
        self._tensors: dict[int, Any] = {}

    def resize(self, num_blocks: int, kept: Blocks) -> None:
        """Have `num_blocks` blocks, all of the present ones included: tensors that are larger already do no harm."""
        for number, port in enumerate(self._ports):
            shape = ov.Shape([num_blocks, *_block_shape(port)])
            new = core().get_default_context(self._device).create_tensor(port.get_element_type(), shape, {})
            if len(kept):
                _part(self._tensors[number], 0, len(kept)).copy_to(_part(new, 0, len(kept)))
            self._request.set_tensor(port, new)
            self._tensors[number] = new

    def copy(self, sources: Blocks, targets: Blocks) -> None:
        """Copy blocks over others."""
        for tensor in self._tensors.values():
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                _part(tensor, source, source + 1).copy_to(_part(tensor, target, target + 1))

    def read(self, blocks: Blocks) -> list[NDArray[np.uint8]]:
        """Refuse: what a GPU holds is not written to files."""
        raise DeviceError(f"keys and values on {self._device} cannot be saved", "run the model on CPU")

    def write(self, blocks: Blocks, content: NDArray[np.uint8]) -> int:
        """Refuse: what a GPU holds is not read from files."""
        raise DeviceError(f"keys and values on {self._device} cannot be loaded", "run the model on CPU")


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Return so many bytes, the first on a cache line; the system touches them only when they are used."""
    buffer = np.zeros(size + CACHE_ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % CACHE_ALIGNMENT
    return buffer[first : first + size]


def _block_shape(port: ov.ConstOutput) -> list[int]:
    return [int(dimension.get_length()) for dimension in list(port.get_partial_shape())[1:]]


def _layout(ports: Sequence[ov.ConstOutput]) -> list[str]:
    return [f"{port.get_element_type().to_string()} {_block_shape(port)}" for port in ports]


def _part(tensor: Any, first: int, end: int) -> Any:
    """Return blocks `first` to `end` of a remote tensor."""
    shape = list(tensor.get_shape())
    return ov.RemoteTensor(tensor, ov.Coordinate([first] + [0] * (len(shape) - 1)), ov.Coordinate([end, *shape[1:]]))
