"""Which blocks are held: at every step all that is seen, and never more than a block beside."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.kv.block_sparse import BlockTable

BLOCK, HEADS, KV_HEADS = 16, 4, 2
PATTERNS = [
    FULL,
    LayerPattern(window=48, sink=20),
    LayerPattern(window=37, by_tokens=True),
    LayerPattern(window=32, stride=4, offsets=(0, 1)),
    LayerPattern(window=16, stride=3, offsets=(0, 1, 2, 0), num_dense_heads=1),
]


class Cache:
    """A table with the content of its blocks: which logical block of which head each physical one holds."""

    def __init__(self, pattern: LayerPattern) -> None:
        self.pattern = pattern
        self.table = BlockTable(pattern, BLOCK, HEADS, KV_HEADS)
        self.table.widen(200)
        self.content: dict[int, tuple[int, int]] = {}
        self.num_tokens = 0

    def forward(self, count: int) -> None:
        past, end = self.num_tokens, self.num_tokens + count
        self.table.hold(past, end, self.resize)
        for head in range(KV_HEADS):
            for block in range(past // BLOCK, -(-end // BLOCK)):
                self.content[int(self.table.table[head, block])] = (head, block)
        self.check(past, end)
        self.num_tokens = end

    def resize(self, num_blocks: int) -> None:
        old, new = self.table.resize(num_blocks)
        self.content = {int(n): self.content[int(o)] for o, n in zip(old, new, strict=True)}

    def check(self, past: int, end: int) -> None:
        """Every block that tokens `past` to `end` see holds what it should; the rest is at most a block more a head."""
        seen = self.pattern.token_mask(np.arange(past, end), 200 * BLOCK, HEADS, BLOCK)
        seen = seen.reshape(KV_HEADS, -1, end - past, 200, BLOCK).any(axis=(1, 2, 4))
        for head, block in np.argwhere(seen):
            assert self.content[int(self.table.table[head, block])] == (head, block)
        held = self.table.table >= 0
        assert len(set(self.table.table[held].tolist())) == held.sum()
        near = self.pattern.held_blocks(past + 1, KV_HEADS, HEADS, BLOCK).sum(axis=1)
        assert (held.sum(axis=1) <= near + 2 + -(-(end - past) // BLOCK)).all()

    def rollback(self, num_tokens: int) -> int:
        self.num_tokens = self.table.rollback(num_tokens)
        return self.num_tokens


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_seen_is_held(pattern, seed):
    """Prompts in chunks and drafts of which a part is rejected, across every edge of blocks and window."""
    cache, chance = Cache(pattern), random.Random(seed)
    while cache.num_tokens < 1500:
        count = chance.choice([1, 1, 2, 5, 8, 8, 40, 100])
        cache.forward(count)
        if count <= 8:
            kept = cache.num_tokens - chance.randrange(count)
            assert cache.rollback(kept) == kept


def test_turns_may_begin_a_block_before_the_end():
    """A chat's next turn shares all but the last few tokens of the last one, wherever in a block it ended."""
    for end in range(300, 340):
        cache = Cache(LayerPattern(window=48, sink=20))
        cache.forward(end)
        cache.forward(1)
        assert cache.rollback(end - BLOCK) == end - BLOCK
        cache.forward(3)


def test_what_is_gone_is_not_continued_from():
    cache = Cache(LayerPattern(window=48))
    cache.forward(300)
    cache.forward(1)
    assert cache.rollback(100) == 0
    cache.forward(120)


def test_a_full_layer_can_be_continued_from_anywhere():
    cache = Cache(FULL)
    cache.forward(300)
    assert cache.rollback(7) == 7
    cache.forward(30)


def test_memory_of_a_window_does_not_grow():
    """A prompt needs more while it is read; what it leaves free is given back."""
    cache = Cache(LayerPattern(window=48, sink=16))
    cache.forward(400)
    sizes = []
    for _ in range(400):
        cache.forward(1)
        sizes.append(cache.table.num_blocks)
    assert max(sizes) == sizes[-1] == KV_HEADS * (1 + 3 + 1)


def test_a_cache_that_grows_puts_the_blocks_of_a_head_in_order():
    """Reused ones would lie anywhere, which takes a processor longer to read."""
    table = BlockTable(LayerPattern(window=32, stride=4, offsets=(0, 1)), BLOCK, HEADS, KV_HEADS)
    table.widen(200)
    orders = []

    def resize(num_blocks: int) -> None:
        table.resize(num_blocks)
        orders.append(table.table[table.table >= 0])

    for past in range(0, 199 * BLOCK, 8):
        table.hold(past, past + 8, resize)
    assert len(orders) > 5
    for order in orders:
        assert np.array_equal(order, np.arange(len(order)))
