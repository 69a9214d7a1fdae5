"""Keys and values in blocks of one KV head each, of which a layer holds those that its pattern still sees.

Layers of one pattern share a `BlockTable`: for each KV head the physical block of every logical one, -1 where none is
held. A block that has left the window and belongs to no shard is freed and reused. Nothing is freed that a token after
those accepted could see, so a rejected draft may cross any block's edge; one more block is kept than that, because the
next turn of a chat often begins a few tokens before the end of the last.

Source of the rule: a key that is unseen once is never seen again (KV-efficiency, arXiv 2407.17678).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.models.attention import LayerPattern
from edge_runtime.models.kv.stock import aligned_bytes
from edge_runtime.models.passes.block_sparse_attention import BlockAttention, block_table_input, cache_input

NARROW = 16
"""Most tokens of a step that is not part of a prompt."""
SPARE = 8
"""Where the blocks held become more and more, a cache grows by one block for so many."""


class BlockTable:
    """Which blocks one group of layers holds.

    Args:
        pattern: Attention pattern of these layers.
        block_size: Tokens of a block.
        num_heads: H.
        num_kv_heads: H_kv.

    Attributes:
        table: (H_kv, n) physical blocks, -1 where none is held.
        num_blocks: Physical blocks there are.
    """

    def __init__(self, pattern: LayerPattern, block_size: int, num_heads: int, num_kv_heads: int) -> None:
        self.pattern, self._block_size = pattern, block_size
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        self.table = np.full((num_kv_heads, 0), -1, np.int32)
        self.num_blocks = 0
        self._free: list[int] = []
        self._end = self._left = 0
        self._settled = -1

    def hold(self, past: int, end: int, resize: Callable[[int], object]) -> None:
        """Hold what tokens `past` to `end` see, and make room for them: mostly nothing is to be done for it.

        Args:
            past: Number of tokens that are accepted.
            end: Number of tokens once those computed next are added.
            resize: Called where there are to be more or fewer physical blocks; calls `resize` of this table.
        """
        if end <= self._end * self._block_size and past // self._block_size == self._settled:
            return
        self.leave(past)
        wanted = self.wanted_blocks(end, end - past <= NARROW)
        if wanted != self.num_blocks:
            resize(wanted)
        self.enter(end)

    def leave(self, past: int) -> None:
        """Free what a token from `past` on does not see, nor one of the block before."""
        self._settled = past // self._block_size
        first_near = self._first_near(max(0, past - self._block_size))
        if first_near > self._left and not self.pattern.is_full:
            gone = np.arange(self._left, first_near)
            self._release(
                ~self.pattern.kept_blocks(gone, self._num_kv_heads, self._num_heads, self._block_size), self._left
            )
            self._left = first_near

    def enter(self, end: int) -> None:
        """Give every head the blocks of tokens up to `end`."""
        last = -(-end // self._block_size)
        if last > self._end:
            count = (last - self._end) * self._num_kv_heads
            taken, self._free = self._free[: -count - 1 : -1], self._free[:-count]
            self.table[:, self._end : last] = np.reshape(taken, (self._num_kv_heads, -1))
            self._end = last

    def wanted_blocks(self, end: int, is_narrow: bool) -> int:
        """Return how many physical blocks there should be before tokens up to `end` enter.

        Args:
            end: Number of tokens once those are added.
            is_narrow: Whether they are few, so that what a prompt has left free is given back.
        """
        entering = max(0, -(-end // self._block_size) - self._end) * self._num_kv_heads
        held = self.num_blocks - len(self._free) + entering
        spare = held // SPARE if self.pattern.stride else 0
        most = held + 2 * (spare + self._num_kv_heads)
        has_excess = is_narrow and not self.pattern.is_full and self.num_blocks > most
        return held + spare if held > self.num_blocks or has_excess else self.num_blocks

    def rollback(self, num_tokens: int) -> int:
        """Forget the blocks after the first `num_tokens` tokens; return how many can be continued from: these, or 0."""
        kept = num_tokens if self._first_near(num_tokens) >= self._left else 0
        first = -(-kept // self._block_size)
        if first < self._end:
            self._release(np.ones((self._num_kv_heads, self._end - first), bool), first)
            self._end, self._left, self._settled = first, min(self._left, first), -1
        return kept

    def widen(self, blocks: int) -> None:
        """Let the table have a column for each of so many logical blocks."""
        more = max(0, blocks - self.table.shape[1])
        self.table = np.pad(self.table, ((0, 0), (0, more)), constant_values=-1)

    def resize(self, num_blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Have so many physical blocks, not fewer than are held; return the old and the new number of each held one.

        Those of a head come to lie one after another, which processors read faster: 32 GB/s and 28 where reused blocks
        lie anywhere (blocks of 17 KB, EPYC with 2 cores).
        """
        held = self.table >= 0
        old = self.table[held].astype(np.int64)
        new = np.arange(len(old))
        self.table[held] = new
        self.num_blocks = num_blocks
        is_free = np.ones(num_blocks, bool)
        is_free[new] = False
        self._free = np.flatnonzero(is_free)[::-1].tolist()
        return old, new

    def _first_near(self, position: int) -> int:
        return self.pattern.local_start(position, self._block_size) // self._block_size

    def _release(self, chosen: NDArray[np.bool_], first: int) -> None:
        """Free the chosen blocks, (H_kv, n), of the logical ones from `first` on."""
        part = self.table[:, first : first + chosen.shape[1]]
        self._free += part[chosen & (part >= 0)].tolist()
        part[chosen] = -1


class _Group:
    """The layers of one pattern: their table, and a cache tensor for each."""

    def __init__(
        self,
        compiled: ov.CompiledModel,
        request: ov.InferRequest,
        number: int,
        layers: Sequence[int],
        table: BlockTable,
    ) -> None:
        self.table = table
        self._request, self._number = request, number
        shapes = {name: compiled.input(name).get_partial_shape() for name in map(cache_input, layers)}
        self._block_bytes = {name: int(shape[1].get_length()) for name, shape in shapes.items()}
        self._memory = {name: aligned_bytes(0) for name in shapes}

    def hold(self, past: int, end: int) -> None:
        self.table.hold(past, end, self.resize)

    def resize(self, num_blocks: int) -> None:
        """Have so many physical blocks in every layer, with what is held."""
        old, new = self.table.resize(num_blocks)
        for name, size in self._block_bytes.items():
            memory = aligned_bytes(num_blocks * size)
            memory.reshape(-1, size)[new] = self._memory[name].reshape(-1, size)[old]
            self._memory[name] = memory
            self._request.set_tensor(name, ov.Tensor(memory, ov.Shape([num_blocks, size]), ov.Type.u8))

    def reserve(self, blocks: int) -> None:
        """Have at least so many physical blocks for each head."""
        if blocks * len(self.table.table) > self.table.num_blocks:
            self.resize(blocks * len(self.table.table))

    def widen(self, blocks: int) -> None:
        self.table.widen(blocks)
        self.bind(self.table.table[None])

    def bind(self, tables: NDArray[np.int32]) -> None:
        """Let the op read blocks of B sequences, (B, H_kv, n)."""
        self._bound = tables  # the tensor only points into it
        self._request.set_tensor(block_table_input(self._number), ov.Tensor(tables, shared_memory=True))

    @property
    def inputs(self) -> list[str]:
        """Names of the layers' cache inputs."""
        return list(self._block_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(self._block_bytes.values())


class BlockCache:
    """The inputs of BlockSparseAttention; implements `paged_cache.KvCache`.

    Args:
        compiled: The model.
        request: Whose inputs are bound.
        attention: What its layers see.
    """

    def __init__(self, compiled: ov.CompiledModel, request: ov.InferRequest, attention: BlockAttention) -> None:
        self.block_size = attention.pattern.block_size
        self.capacity = 0
        self._request = request
        self._groups = [
            _Group(compiled, request, number, layers, BlockTable(pattern, self.block_size, *attention.heads[layers[0]]))
            for number, (pattern, layers) in enumerate(
                zip(attention.pattern.patterns, attention.pattern.groups, strict=True)
            )
        ]
        self._past_lens = self._bind_past(np.zeros(1, np.int32))

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens, and keep what is held; layers that see few take memory when they need it."""
        blocks = -(-num_tokens // self.block_size)
        for group in self._groups:
            if blocks * self.block_size > self.capacity:
                group.widen(blocks)
            if group.table.pattern.is_full:
                group.reserve(blocks)
        self.capacity = max(self.capacity, blocks * self.block_size)

    def reserve_blocks(self, blocks: int) -> None:
        """Make room for so many blocks of tokens in every layer and head."""
        for group in self._groups:
            group.reserve(blocks)

    def hold(self, past: int, end: int) -> None:
        """Let the next inference compute tokens `past` to `end`: free what they no longer see, add their blocks."""
        self._past_lens[0] = past
        for group in self._groups:
            group.hold(past, end)

    def hold_sequences(self, past: NDArray[np.int32], longest: int, blocks: NDArray[np.int32]) -> None:
        """Let the next inference continue several sequences, all blocks of which are held."""
        self._past_lens = self._bind_past(past)
        for group in self._groups:
            heads = len(group.table.table)
            group.bind(np.ascontiguousarray(blocks[:, None] * heads + np.arange(heads, dtype=np.int32)[:, None]))

    def rollback(self, num_tokens: int) -> int:
        """Forget all but the first `num_tokens` tokens; return how many can be continued from: these, or none."""
        kept = min(group.table.rollback(num_tokens) for group in self._groups)
        if kept < num_tokens:
            for group in self._groups:
                group.table.rollback(kept)
        return kept

    @property
    def tensors(self) -> list[ov.Tensor]:
        """All memory of keys and values."""
        return [self._request.get_tensor(name) for group in self._groups for name in group.inputs]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of tokens in all layers and heads."""
        return sum(len(group.table.table) * group.block_bytes for group in self._groups)

    def _bind_past(self, past: NDArray[np.int32]) -> NDArray[np.int32]:
        self._request.set_tensor("past_lens", ov.Tensor(past, shared_memory=True))
        return past
