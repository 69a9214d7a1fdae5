"""What is kept of closed sequences: no more than the bytes say, the longest unused goes first."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.sequence import PagedSequence, Sequences
from edge_runtime.models.kv.store import MOST_ENTRIES

BLOCK, BLOCK_BYTES = 16, 100


class Memory:
    block_bytes, can_move = BLOCK_BYTES, True

    def resize(self, num_blocks: int, kept: np.ndarray) -> None:
        """Nothing is stored."""

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Nothing is stored."""


def make(max_blocks: int, *patterns: LayerPattern) -> Sequences:
    pools = [BlockPool(Memory(), pattern, BLOCK, 2, 1) for pattern in patterns or (FULL,)]
    return Sequences(pools, 10_000, max_blocks * BLOCK_BYTES)


def held(sequences: Sequences, token_ids: list[int]) -> PagedSequence:
    """Return a sequence that holds these tokens, computed as far as they were not held."""
    sequence = sequences.open(token_ids)
    for table in sequence.tables:
        table.hold(sequence.num_tokens, len(token_ids))
    sequence.token_ids[:] = token_ids
    return sequence


def run(sequences: Sequences, token_ids: list[int]) -> int:
    """Open, compute and close a sequence; return how many of its tokens were held."""
    known = sequences.open(token_ids)
    count = known.num_tokens
    known.rollback(0)
    known.close()
    held(sequences, token_ids).close()
    return count


def text(number: int, length: int = 5 * BLOCK) -> list[int]:
    return [number, *range(1000, 999 + length)]


def test_bytes_are_bounded_and_the_longest_unused_goes_first():
    sequences = make(max_blocks=16)  # three texts of five blocks
    for number in range(3):
        assert run(sequences, text(number)) == 0
    assert sequences.store.num_bytes == 15 * BLOCK_BYTES
    assert run(sequences, text(0)) == 5 * BLOCK - 1  # used again
    assert run(sequences, text(3)) == 0
    assert sequences.store.num_bytes <= 16 * BLOCK_BYTES
    known = [sequences.open([*text(number), 1]).num_tokens for number in range(4)]
    assert known == [5 * BLOCK, 0, 5 * BLOCK, 5 * BLOCK]


def test_shared_blocks_are_counted_once():
    """Forty chats that begin with the same instructions hold these once."""
    sequences = make(max_blocks=1000)
    for number in range(40):
        run(sequences, [*text(0), number, *range(BLOCK)])
    assert len(sequences.store) == 40
    assert sequences.store.num_bytes == (5 + 40 * 2) * BLOCK_BYTES


def test_a_longer_text_takes_the_place_of_its_beginning():
    sequences = make(max_blocks=1000)
    for length in (20, 50, 90, 90, 30):
        run(sequences, text(0, length))
    assert len(sequences.store) == 1
    assert sequences.open([*text(0, 90), 5]).num_tokens == 90


def test_windows_keep_what_only_the_shorter_text_can_be_continued_from():
    sequences = make(1000, LayerPattern(window=2 * BLOCK))
    run(sequences, text(0, 40))
    long = held(sequences, text(0, 400))
    for table in long.tables:
        table.hold(400, 401)  # the window moves on
    long.close()
    assert len(sequences.store) == 2
    assert sequences.open([*text(0, 40), 7]).num_tokens == 40
    assert sequences.open([*text(0, 400), 7]).num_tokens == 400


def test_of_a_text_that_is_too_long_its_beginning_is_kept():
    """Else a chat that has grown beyond the bound would be read again whole at each turn."""
    sequences = make(max_blocks=3)
    run(sequences, text(0, 10 * BLOCK + 3))
    assert sequences.store.num_bytes == 3 * BLOCK_BYTES
    assert sequences.open(text(0, 10 * BLOCK)).num_tokens == 3 * BLOCK
    windowed = make(1, LayerPattern(window=4 * BLOCK))
    long = held(windowed, text(0, 10 * BLOCK + 3))
    for table in long.tables:
        table.hold(10 * BLOCK + 3, 10 * BLOCK + 4)  # the window has moved on: a shorter beginning is good for nothing
    long.close()
    assert windowed.store.num_bytes == len(windowed.store) == 0


def test_nothing_is_kept_where_no_bytes_are_given():
    """Sequences in use still share."""
    sequences = make(max_blocks=0)
    run(sequences, text(0))
    assert sequences.open(text(0)).num_tokens == 0
    using = held(sequences, text(1))
    assert sequences.open(text(1)).num_tokens == 5 * BLOCK - 1
    using.close()
    assert (len(sequences.store), sequences.store.num_bytes) == (0, 0)


def test_the_number_of_texts_is_bounded_too():
    sequences = make(max_blocks=10**6)
    for number in range(MOST_ENTRIES + 10):
        run(sequences, text(number, 3))
    assert len(sequences.store) == MOST_ENTRIES
    assert sequences.open([*text(9, 3), 1]).num_tokens == 0
    assert sequences.open([*text(10, 3), 1]).num_tokens == 3


def test_memory_does_not_grow_with_the_number_of_requests():
    """Full layers and windowed ones; requests overlap and share their beginning with others."""
    sequences = make(200, FULL, LayerPattern(window=2 * BLOCK, sink=BLOCK), LayerPattern(window=BLOCK, stride=3))
    random, sizes, using = np.random.default_rng(0), [], []
    for number in range(600):
        beginning = text(int(random.integers(0, 8)), int(random.integers(1, 200)))
        using.append(held(sequences, [*beginning, number, *range(int(random.integers(0, 60)))]))
        if len(using) == 4:
            using.pop(0).close()
        sizes.append(sequences.num_bytes)
    assert max(sizes[300:]) <= 1.1 * max(sizes[:300])
    for sequence in using:
        sequence.close()
    sequences.store.clear()
    for pool in sequences.pools:
        assert not pool.refs.any() and not pool.tables


@pytest.mark.parametrize("rollback", [0, 20])
def test_what_was_forgotten_is_not_kept(rollback):
    """A sequence whose logits were broken is rolled back to nothing before it is closed."""
    sequences = make(max_blocks=100)
    sequence = held(sequences, text(0))
    sequence.rollback(rollback)
    sequence.close()
    assert sequences.open(text(0)).num_tokens == rollback
    assert sequences.store.num_bytes == -(-rollback // BLOCK) * BLOCK_BYTES
