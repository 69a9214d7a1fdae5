"""Which blocks are held: at every step all that is seen, and never more than a block beside."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.table import BlockTable

BLOCK, HEADS, KV_HEADS = 16, 4, 2
PATTERNS = [
    FULL,
    LayerPattern(window=48, sink=20),
    LayerPattern(window=37, by_tokens=True),
    LayerPattern(window=32, stride=4, offsets=(0, 1)),
    LayerPattern(window=16, stride=3, offsets=(0, 1, 2, 0), num_dense_heads=1),
]


class Content:
    """Memory that remembers which token of which text each slot of a block holds."""

    block_bytes, can_move = 1, True

    def __init__(self) -> None:
        self.slots = np.zeros((0, BLOCK, 3), np.int64)

    def resize(self, num_blocks: int, kept: np.ndarray) -> None:
        new = np.full((num_blocks, BLOCK, 3), -1)
        new[: len(kept)] = self.slots[kept]
        self.slots = new

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.slots[targets] = self.slots[sources]


def make_pool(pattern: LayerPattern) -> BlockPool:
    return BlockPool(Content(), pattern, BLOCK, HEADS, KV_HEADS)


class Text:
    """A sequence of tokens in one group of layers; each token is a number that no other has."""

    def __init__(self, pool: BlockPool, table: BlockTable | None = None, tokens: list[int] | None = None) -> None:
        self.pool, self.table, self.tokens = pool, table or BlockTable(pool), tokens or []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def forward(self, count: int) -> None:
        past, end = self.num_tokens, self.num_tokens + count
        self.table.hold(past, end)
        self.tokens += [next(NUMBERS) for _ in range(count)]
        for head in range(KV_HEADS):
            for position in range(past, end):
                block = self.table.table[head, position // BLOCK]
                self.pool.memory.slots[block, position % BLOCK] = (head, position, self.tokens[position])
        self.check(past, end)

    def check(self, past: int, end: int) -> None:
        """Every token that tokens `past` to `end` see is where it should be; at most a block more a head is held."""
        size = -(-end // BLOCK)
        seen = self.pool.pattern.token_mask(np.arange(past, end), end, HEADS, BLOCK)
        seen = seen.reshape(KV_HEADS, -1, end).any(axis=1)
        for head, position in np.argwhere(seen):
            block = self.table.table[head, position // BLOCK]
            assert block >= 0
            assert self.pool.memory.slots[block, position % BLOCK].tolist() == [head, position, self.tokens[position]]
        held = self.table.table >= 0
        assert not held[:, size:].any()
        assert len(set(self.table.table[held].tolist())) == held.sum()
        near = self.pool.pattern.held_blocks(past + 1, KV_HEADS, HEADS, BLOCK).sum(axis=1)
        assert (held.sum(axis=1) <= near + 2 + -(-(end - past) // BLOCK)).all()

    def rollback(self, num_tokens: int) -> int:
        kept = num_tokens if self.table.can_keep(num_tokens) else 0
        self.table.rollback(kept)
        del self.tokens[kept:]
        return kept

    def fork(self, num_tokens: int) -> Text:
        return Text(self.pool, self.table.fork(num_tokens), self.tokens[:num_tokens])


NUMBERS = itertools.count()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_seen_is_held(pattern, seed):
    """Prompts in chunks and drafts of which a part is rejected, across every edge of blocks and window."""
    text, chance = Text(make_pool(pattern)), random.Random(seed)
    while text.num_tokens < 1500:
        count = chance.choice([1, 1, 2, 5, 8, 8, 40, 100])
        text.forward(count)
        if count <= 8:
            kept = text.num_tokens - chance.randrange(count)
            assert text.rollback(kept) == kept


def test_turns_may_begin_a_block_before_the_end():
    """A chat's next turn shares all but the last few tokens of the last one, wherever in a block it ended."""
    for end in range(300, 340):
        text = Text(make_pool(LayerPattern(window=48, sink=20)))
        text.forward(end)
        text.forward(1)
        assert text.rollback(end - BLOCK) == end - BLOCK
        text.forward(3)


def test_what_is_gone_is_not_continued_from():
    text = Text(make_pool(LayerPattern(window=48)))
    text.forward(300)
    text.forward(1)
    assert text.rollback(100) == 0
    text.forward(120)


def test_a_full_layer_can_be_continued_from_anywhere():
    text = Text(make_pool(FULL))
    text.forward(300)
    assert text.rollback(7) == 7
    text.forward(30)


def test_memory_of_a_window_does_not_grow():
    """A prompt needs more while it is read; what it leaves free is given back."""
    text = Text(make_pool(LayerPattern(window=48, sink=16)))
    text.forward(400)
    sizes = []
    for _ in range(400):
        text.forward(1)
        sizes.append(text.pool.num_blocks)
    assert max(sizes) == sizes[-1] == KV_HEADS * (1 + 3 + 1)


def test_a_pool_that_grows_puts_the_blocks_of_a_head_in_order(monkeypatch):
    """Reused ones would lie anywhere, which takes a processor longer to read."""
    pool = make_pool(LayerPattern(window=32, stride=4, offsets=(0, 1)))
    table, other = BlockTable(pool), BlockTable(pool)
    resize, orders = pool.resize, []

    def observed(num_blocks: int) -> None:
        resize(num_blocks)
        orders.append(np.concatenate([table.blocks(), other.blocks()]))

    monkeypatch.setattr(pool, "resize", observed)
    for past in range(0, 199 * BLOCK, 8):
        table.hold(past, past + 8)
        other.hold(past, past + 8)
    assert len(orders) > 5
    for order in orders:
        assert np.array_equal(order, np.arange(len(order)))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_share_blocks_never_meet(pattern, seed):
    """Forks anywhere, rollbacks and ends in any order: each text finds its own tokens, and all blocks come back."""
    pool, chance = make_pool(pattern), random.Random(seed)
    texts = [Text(pool)]
    for _ in range(250):
        text = chance.choice(texts)
        deed = chance.choice(["forward", "forward", "forward", "fork", "rollback", "release"])
        if deed == "forward" and text.num_tokens < 600:
            text.forward(chance.choice([1, 1, 3, 8, 20, 70]))
        elif deed == "fork" and len(texts) < 6:
            place = max(0, text.num_tokens - chance.choice([0, 0, 1, 5, 16, 40]))
            texts += [text.fork(place)] if text.table.can_keep(place) else []
        elif deed == "rollback":
            text.rollback(max(0, text.num_tokens - chance.choice([1, 4, 20])))
        elif deed == "release":
            text.table.release()
            texts[texts.index(text)] = Text(pool)
        counts = np.zeros(pool.num_blocks, np.int64)
        for other in texts:
            counts[other.table.blocks()] += 1
        assert counts.tolist() == pool.refs.tolist()
    for text in texts:
        text.table.release()
    assert not pool.refs.any() and not pool.tables
    pool.make_room(pool.num_blocks, is_narrow=False)
    assert sorted(pool.take(pool.num_blocks).tolist()) == list(range(pool.num_blocks))


def test_a_fork_copies_one_block_when_it_is_written():
    """Whole blocks stay shared, and whoever writes last into the partial one keeps it."""
    text = Text(make_pool(FULL))
    text.forward(3 * BLOCK + 5)
    fork = text.fork(text.num_tokens)
    assert np.count_nonzero(text.pool.refs) == 4 * KV_HEADS
    fork.forward(1)
    assert np.count_nonzero(text.pool.refs) == 5 * KV_HEADS
    before = text.table.table.copy()
    text.forward(1)
    assert np.array_equal(text.table.table, before)
    fork.rollback(2 * BLOCK + 3)
    fork.forward(4)
    text.check(0, text.num_tokens)


def test_memory_that_was_announced_is_found_at_once():
    """For each of several; growing would copy what is held, over and over."""
    pool = make_pool(FULL)
    texts = [Text(pool), Text(pool)]
    for text in texts:
        text.table.reserve(20 * BLOCK)
    size = pool.num_blocks
    assert size == 2 * 20 * KV_HEADS
    for _ in range(20):
        for text in texts:
            text.forward(BLOCK)
    assert pool.num_blocks == size


def test_a_pool_whose_memory_lacks_stays_as_it_was(monkeypatch):
    pool = make_pool(FULL)
    text = Text(pool)
    text.forward(40)

    def refuse(num_blocks: int, kept: np.ndarray) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool.memory, "resize", refuse)
        with pytest.raises(MemoryError):
            text.table.hold(40, 4000)
    text.check(39, 40)
    text.forward(200)
