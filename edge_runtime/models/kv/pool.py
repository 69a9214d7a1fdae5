"""The blocks that the sequences of a model share, for one group of layers.

A *group* is the layers whose attention follows one pattern, and so holds the same blocks. OpenVINO's PagedAttention
has one group, whose blocks hold all KV heads; our own op has a group for each pattern, and a block for each KV head. A
block is free, or held by one or more tables (`table.py`): of sequences in use, and of those that the store keeps.

A pool that changes its size puts the blocks of a head one after another, which processors read faster: 32 GB/s, and 28
where reused blocks lie anywhere (blocks of 17 KB, EPYC with 2 cores).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.kv.memory import Blocks, DeviceMemory, HostMemory, Memory
from edge_runtime.models.passes.block_sparse_attention import BlockAttention, cache_input

STOCK_CACHES = ("key_cache.", "value_cache.")
"""How the inputs of OpenVINO's PagedAttention are named that hold keys and values."""
GROWTH = 1.5
"""A pool grows by this factor, so that copying it costs a constant share of the work."""
SPARE = 8
"""A pool of windowed layers, which need little, grows by one block for so many, and only where it goes on growing."""


class Holder(Protocol):
    """What holds blocks of a pool: a `table.BlockTable`."""

    @property
    def num_promised(self) -> int:
        """Blocks of a head that were announced and are not yet held, or not yet as its own."""

    def blocks(self) -> Blocks:
        """Return the blocks held, those of a head one after another."""

    def renumber(self, numbers: NDArray[np.int32]) -> None:
        """Give each block that is held its new number."""


class BlockPool:
    """The blocks of one group of layers.

    Args:
        memory: Where they are; empty.
        pattern: What these layers see.
        block_size: Tokens of a block.
        num_heads: H.
        num_kv_heads: H_kv; 1 where a block holds all heads.

    Attributes:
        num_blocks: Blocks there are.
        refs: (num_blocks,) tables that hold each.
        tables: All that may hold blocks, in order of creation.
    """

    def __init__(
        self, memory: Memory, pattern: LayerPattern, block_size: int, num_heads: int = 1, num_kv_heads: int = 1
    ) -> None:
        self.memory, self.pattern = memory, pattern
        self.block_size, self.num_heads, self.num_kv_heads = block_size, num_heads, num_kv_heads
        self.num_blocks = 0
        self.refs = np.zeros(0, np.int32)
        self.tables: dict[Holder, None] = {}
        self._kept_refs = np.zeros(0, np.int32)
        self._free: list[int] = []
        self.resize(num_kv_heads)  # the plugin wants tensors that are not empty

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.num_blocks * self.memory.block_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the blocks that the store keeps, each counted once."""
        return int(np.count_nonzero(self._kept_refs)) * self.memory.block_bytes

    def take(self, count: int) -> Blocks:
        """Return so many free blocks, for which `make_room` has made room, in rising order where that is possible."""
        taken = np.array(self._free[: -count - 1 : -1], np.int32)
        del self._free[len(self._free) - count :]
        self.refs[taken] = 1
        return taken

    def share(self, blocks: Blocks) -> None:
        """Let one more table hold these blocks."""
        self.refs[blocks] += 1

    def release(self, blocks: Blocks) -> None:
        """Let one table less hold these blocks, and free those that no other holds."""
        self.refs[blocks] -= 1
        self._free += blocks[self.refs[blocks] == 0].tolist()

    def keep(self, blocks: Blocks, change: int) -> None:
        """Note that one more (1) or one less (-1) table of the store holds these blocks."""
        self._kept_refs[blocks] += change

    def make_room(self, count: int, is_narrow: bool) -> None:
        """Have at least `count` free blocks.

        Args:
            count: Blocks that are to be taken.
            is_narrow: Whether it is for few tokens, so that what a prompt of windowed layers left free is given back.
        """
        needed = self.num_blocks - len(self._free) + count
        if self.pattern.is_full:
            if needed > self.num_blocks:
                self.resize(max(needed, int(self.num_blocks * GROWTH)))
            return
        spare = needed // SPARE if self.pattern.stride or len(self.tables) > 1 else 0
        most = needed + max(2 * (spare + self.num_kv_heads), needed // SPARE)
        if needed > self.num_blocks or (is_narrow and self.num_blocks > most):
            self.resize(needed + spare)

    def reserve(self) -> None:
        """Have the blocks that were promised; windowed layers take theirs when they need them."""
        if self.pattern.is_full:
            promised = self.num_kv_heads * sum(table.num_promised for table in self.tables)
            needed = self.num_blocks - len(self._free) + promised
            if needed > self.num_blocks:
                self.resize(max(needed, int(self.num_blocks * GROWTH)))

    def resize(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks, not fewer than are held; those get new numbers, in their tables too."""
        kept: Blocks = self._in_order() if self.memory.can_move else np.arange(self.num_blocks)
        self.memory.resize(num_blocks, kept)
        numbers = np.full(self.num_blocks, -1, np.int32)
        numbers[kept] = np.arange(len(kept))
        for table in self.tables:
            table.renumber(numbers)
        self.refs, self._kept_refs = (
            np.concatenate([counts[kept], np.zeros(num_blocks - len(kept), np.int32)])
            for counts in (self.refs, self._kept_refs)
        )
        self.num_blocks = num_blocks
        self._free = np.flatnonzero(self.refs == 0)[::-1].tolist()

    def _in_order(self) -> Blocks:
        """Return the blocks that are held, those of a table's head one after another."""
        blocks = np.concatenate([np.zeros(0, np.int32), *(table.blocks() for table in self.tables)])
        _, first = np.unique(blocks, return_index=True)
        return blocks[np.sort(first)]


def stock_pools(compiled: ov.CompiledModel, request: ov.InferRequest, device: str) -> list[BlockPool]:
    """Return the one pool of a model with OpenVINO's PagedAttention."""
    ports = {name: port for port in compiled.inputs for name in port.get_names() if name.startswith(STOCK_CACHES)}
    block_size = int(ports[f"{STOCK_CACHES[1]}0"].get_partial_shape()[2].get_length())
    caches = [ports[name] for name in sorted(ports)]
    on_gpu = device.startswith("GPU")
    memory: Memory = DeviceMemory(request, caches, device) if on_gpu else HostMemory(request, caches)
    return [BlockPool(memory, FULL, block_size)]


def own_pools(compiled: ov.CompiledModel, request: ov.InferRequest, attention: BlockAttention) -> list[BlockPool]:
    """Return the pools of a model with our own attention, in the order of its patterns."""

    def pool(pattern: LayerPattern, layers: tuple[int, ...]) -> BlockPool:
        caches = [compiled.input(cache_input(layer)) for layer in layers]
        return BlockPool(
            HostMemory(request, caches), pattern, attention.pattern.block_size, *attention.heads[layers[0]]
        )

    return list(map(pool, attention.pattern.patterns, attention.pattern.groups))
