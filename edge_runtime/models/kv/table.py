"""Which blocks one sequence holds in one group of layers.

A block that has left the window and belongs to no shard is freed and reused. Nothing is freed that a token after those
accepted could see, so a rejected draft may cross any block's edge; one more block is kept than that, because the next
turn of a chat often begins a few tokens before the end of the last.

Sequences that began alike share blocks. Only the last one of a sequence is ever written, so only that one is copied, by
whichever sequence writes first (copy on write).

Source of the rule: a key that is unseen once is never seen again (KV-efficiency, arXiv 2407.17678).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from edge_runtime.models.kv.memory import Blocks
from edge_runtime.models.kv.pool import GROWTH, BlockPool

NARROW = 16
"""Most tokens of a step that is not part of a prompt."""
_ENDLESS = 1 << 62
_NOTHING = np.zeros((0, 2), np.intp)
_versions = itertools.count(1)


class BlockTable:
    """The blocks of one sequence in one group of layers.

    Args:
        pool: The group's blocks.

    Attributes:
        table: (H_kv, n) blocks, -1 where none is held.
        version: A number that no other table or state of this one has.
        left: How many blocks the window has left behind, which are held only where they are seen from far away.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.table = np.full((pool.num_kv_heads, 1), -1, np.int32)
        self.version = next(_versions)
        self._size = pool.block_size
        self._end = self.left = self._promised = 0
        # While these bounds hold, `hold` has nothing to do: the blocks that are written are there, and not shared.
        self._from = self._until = self._room = 0
        pool.tables[self] = None

    @property
    def num_promised(self) -> int:
        """Blocks of a head that were announced and are not yet held, or not yet as its own."""
        return max(0, self._promised - self._end) + (self._until == 0 < self._end)

    def reserve(self, num_tokens: int) -> None:
        """Announce that up to so many tokens may be held."""
        self._promised = -(-num_tokens // self._size)
        self._widen(self._promised)
        self.pool.reserve()

    def hold(self, past: int, end: int) -> None:
        """Hold what tokens `past` to `end` see, and have blocks of its own for them: mostly nothing is to be done.

        Args:
            past: Number of tokens that are accepted.
            end: Number of tokens once those computed next are added.
        """
        if self._from <= past < self._until and end <= self._room:
            return
        self._leave(past)
        first, last = past // self._size, -(-end // self._size)
        shared = self._shared(first)
        entering = max(0, last - self._end) * self.pool.num_kv_heads
        self.pool.make_room(len(shared) + entering, end - past <= NARROW)
        if len(shared):
            self._copy(*shared.T)
        if entering:
            self._enter(last)
        self._from, self._room = first * self._size, self._end * self._size
        self._until = _ENDLESS if self.pool.pattern.is_full else self._from + self._size

    def can_keep(self, num_tokens: int) -> bool:
        """Whether a token after the first `num_tokens` finds all that it sees."""
        return finds_all(self.pool, self.left, num_tokens)

    def rollback(self, num_tokens: int) -> None:
        """Forget the blocks after the first `num_tokens` tokens, which `can_keep` has agreed to, or which are none."""
        first = -(-num_tokens // self._size)
        if first < self._end:
            part = self._part(first)
            self.pool.release(part[part >= 0])
            part[...] = -1
            self._end, self.left = first, min(self.left, first)
            self._room = min(self._room, first * self._size)
            self.version = next(_versions)

    def fork(self, num_tokens: int) -> BlockTable:
        """Return a table of the first `num_tokens` tokens, which `can_keep` has agreed to; blocks are shared."""
        made = BlockTable(self.pool)
        made._end = -(-num_tokens // self._size)
        made.left = min(self.left, made._end)
        made.table = self.table[:, : max(1, made._end)].copy()
        if not made._end:
            made.table[...] = -1
        self.pool.share(made.blocks())
        self._until = 0  # the last block, if it is not full, is no longer this one's own
        return made

    def restore(self, num_tokens: int, left: int) -> Blocks:
        """Have the blocks that a table with so many tokens had, to be filled; return them in the order of `blocks`.

        Args:
            num_tokens: Tokens that were held.
            left: Blocks that its window had left behind.
        """
        pool, last = self.pool, -(-num_tokens // self._size)
        numbers = np.arange(last)
        held = pool.pattern.kept_blocks(numbers, pool.num_kv_heads, pool.num_heads, self._size) | (numbers >= left)
        pool.make_room(int(np.count_nonzero(held)), is_narrow=False)
        self._widen(last)
        self.table[:, :last][held] = pool.take(int(np.count_nonzero(held)))
        self._end, self.left = last, left
        return self.blocks()

    def release(self) -> None:
        """Hold nothing any more, for good."""
        self.rollback(0)
        del self.pool.tables[self]

    def keep(self, change: int) -> None:
        """Note that the store keeps this table from now on (1), or no longer does (-1)."""
        self._promised = 0
        self.pool.keep(self.blocks(), change)

    def blocks(self) -> Blocks:
        """Return the blocks held, those of a head one after another."""
        return self.table[self.table >= 0]

    def renumber(self, numbers: NDArray[np.int32]) -> None:
        """Give each block that is held its new number."""
        held = self.table >= 0
        self.table[held] = numbers[self.table[held]]
        self.version = next(_versions)

    def _leave(self, past: int) -> None:
        """Free what a token from `past` on does not see, nor one of the block before."""
        pool = self.pool
        now_left = first_near(pool, max(0, past - self._size))
        if now_left > self.left and not pool.pattern.is_full:
            gone = np.arange(self.left, now_left)
            part = self.table[:, self.left : now_left]
            chosen = ~pool.pattern.kept_blocks(gone, pool.num_kv_heads, pool.num_heads, self._size) & (part >= 0)
            pool.release(part[chosen])
            part[chosen] = -1
            self.left = now_left
            self.version = next(_versions)

    def _enter(self, last: int) -> None:
        """Give every head its blocks up to number `last`."""
        self._widen(last)
        heads = self.pool.num_kv_heads
        taken = self.pool.take((last - self._end) * heads)
        self.table[:, self._end : last] = taken.reshape(heads, -1)
        self._end = last
        self.version = next(_versions)

    def _shared(self, first: int) -> NDArray[np.intp]:
        """Return head and column of each block from column `first` on that another table holds too, (n, 2)."""
        if first >= self._end:
            return _NOTHING
        part = self._part(first)
        places: NDArray[np.intp] = np.argwhere((part >= 0) & (self.pool.refs[part] > 1))
        places += (0, first)
        return places

    def _copy(self, heads: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Have blocks of its own in the place of shared ones."""
        shared = self.table[heads, places]
        taken = self.pool.take(len(shared))
        self.pool.memory.copy(shared, taken)
        self.table[heads, places] = taken
        self.pool.release(shared)
        self.version = next(_versions)

    def _widen(self, blocks: int) -> None:
        """Have a column for each of so many blocks."""
        more = blocks - self.table.shape[1]
        if more > 0:
            more = max(more, int(self.table.shape[1] * (GROWTH - 1)))
            self.table = np.pad(self.table, ((0, 0), (0, more)), constant_values=-1)

    def _part(self, first: int) -> NDArray[np.int32]:
        """Return the columns from `first` on that are in use."""
        return self.table[:, first : self._end]


def first_near(pool: BlockPool, position: int) -> int:
    """Return the number of the first block in the local window of a token."""
    return pool.pattern.local_start(position, pool.block_size) // pool.block_size


def finds_all(pool: BlockPool, left: int, num_tokens: int) -> bool:
    """Whether a token after the first `num_tokens` finds all that it sees, where a window has left so many blocks."""
    return left == 0 or first_near(pool, num_tokens) >= left
