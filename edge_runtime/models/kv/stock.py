"""Keys and values in the form of OpenVINO's own PagedAttention: two tensors a layer, one list of blocks for all layers.

The plugin writes into tensors that we own and pass as inputs. Rolling back is passing a smaller `past_lens`: nothing is
copied, and what lies behind it is overwritten later.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.devices import core

CACHE_ALIGNMENT = 64
"""Bytes of a cache line, which a vector load should not cross."""
STOCK_CACHES = ("key_cache.", "value_cache.")


class KvCache(Protocol):
    """Where the keys and values of one sequence are, or of several that are computed at once.

    Attributes:
        block_size: Tokens of a block.
    """

    block_size: int

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens, and keep what is held."""

    def hold(self, past: int, end: int) -> None:
        """Let the next inference compute tokens `past` to `end`, for which there is room."""

    def rollback(self, num_tokens: int) -> int:
        """Forget all but the first `num_tokens` tokens; return how many can be continued from: these, or none."""

    def reserve_blocks(self, blocks: int) -> None:
        """Make room for so many blocks of tokens, for several sequences."""

    def hold_sequences(self, past: NDArray[np.int32], longest: int, blocks: NDArray[np.int32]) -> None:
        """Let the next inference continue B sequences: (B,) tokens of each that are there, and (B, n) their blocks."""

    @property
    def tensors(self) -> list[ov.Tensor]:
        """All memory of keys and values."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of tokens in all layers."""


class StockCache:
    """The inputs of PagedAttention; implements `KvCache`.

    Args:
        compiled: The model.
        request: Whose inputs are bound.
        device: It runs on.
    """

    def __init__(self, compiled: ov.CompiledModel, request: ov.InferRequest, device: str) -> None:
        names = {name for port in compiled.inputs for name in port.get_names()}
        self._request, self._device = request, device
        self._ports = {name: compiled.input(name) for name in names if name.startswith(STOCK_CACHES)}
        self.block_size = int(self._ports[f"{STOCK_CACHES[1]}0"].get_partial_shape()[2].get_length())
        self._num_blocks = self._num_tokens = 0
        self._memory: dict[str, NDArray[Any]] = {}
        self._past_lens = self._bind("past_lens", np.zeros(1, np.int32))
        self._max_context_len = self._bind("max_context_len", np.zeros((), np.int32))
        self._begins = self._bind("block_indices_begins", np.zeros(2, np.int32))

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._num_blocks * self.block_size

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens, and keep what is held."""
        self.reserve_blocks(-(-num_tokens // self.block_size))

    def reserve_blocks(self, blocks: int) -> None:
        """Make room for so many blocks."""
        if blocks <= self._num_blocks:
            return
        for name in self._ports:
            self._grow(name, blocks)
        self._num_blocks = blocks
        self._begins[1] = blocks
        self._bind("block_indices", np.arange(blocks, dtype=np.int32))

    def hold(self, past: int, end: int) -> None:
        """Let the next inference compute tokens `past` to `end`."""
        self._past_lens[0] = past
        self._max_context_len[...] = end
        self._num_tokens = end

    def hold_sequences(self, past: NDArray[np.int32], longest: int, blocks: NDArray[np.int32]) -> None:
        """Let the next inference continue several sequences."""
        begins = np.arange(0, blocks.size + 1, blocks.shape[1], dtype=np.int32)
        self._past_lens = self._bind("past_lens", past)
        self._max_context_len = self._bind("max_context_len", np.array(longest, np.int32))
        self._begins = self._bind("block_indices_begins", begins)
        self._bind("block_indices", blocks.ravel())
        self._num_tokens = longest

    def rollback(self, num_tokens: int) -> int:
        """Return `num_tokens`: every earlier token is held."""
        return num_tokens

    @property
    def tensors(self) -> list[ov.Tensor]:
        """All memory of keys and values."""
        return [self._request.get_tensor(port) for port in self._ports.values()]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of tokens in all layers."""
        return sum(int(tensor.get_byte_size()) for tensor in self.tensors) // self._num_blocks

    def _bind(self, name: str, values: NDArray[np.int32]) -> NDArray[np.int32]:
        self._memory[name] = values  # the tensor only points into it
        self._request.set_tensor(name, ov.Tensor(values, shared_memory=True))
        return values

    def _grow(self, name: str, blocks: int) -> None:
        port = self._ports[name]
        shape = [blocks] + [dimension.get_length() for dimension in list(port.get_partial_shape())[1:]]
        grow = self._grow_on_gpu if self._device.startswith("GPU") else self._grow_on_host
        self._request.set_tensor(port, grow(name, port.get_element_type(), shape))

    def _grow_on_host(self, name: str, element_type: ov.Type, shape: list[int]) -> ov.Tensor:
        """Allocate, and copy the old bytes: blocks are the outermost axis."""
        old = self._memory.get(name)
        self._memory[name] = aligned_bytes(math.prod(shape) * element_type.bitwidth // 8)
        if old is not None and self._num_tokens:
            self._memory[name][: len(old)] = old
        return ov.Tensor(self._memory[name], ov.Shape(shape), element_type)

    def _grow_on_gpu(self, name: str, element_type: ov.Type, shape: list[int]) -> Any:
        new = core().get_default_context(self._device).create_tensor(element_type, ov.Shape(shape), {})
        if self._num_blocks and self._num_tokens:
            end = ov.Coordinate([self._num_blocks, *shape[1:]])
            kept = ov.RemoteTensor(new, ov.Coordinate([0] * len(shape)), end)
            self._request.get_tensor(self._ports[name]).copy_to(kept)
        return new


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Return so many bytes, the first on a cache line; the system touches them only when they are used."""
    buffer = np.zeros(size + CACHE_ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % CACHE_ALIGNMENT
    return buffer[first : first + size]
