"""What every model offers its callers: a sequence that is caught up computes only what it does not hold."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.models.base import advance, catch_up, num_common
from tests.runtime.fakes import TableModel, random_table

V = 12
TABLE = random_table(V, 1)


def fresh(token_ids: list[int]) -> np.ndarray:
    """Return the logits after tokens that a new model is given."""
    model = TableModel(TABLE)
    return catch_up(model, model.sequence(), token_ids)


@pytest.mark.parametrize(
    ("held", "wanted", "shared"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 1),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1], 0),
    ],
    ids=["empty", "longer", "same", "shorter", "fork", "nothing shared", "one token"],
)
def test_catch_up_keeps_the_shared_beginning(held, wanted, shared):
    """The last token is always computed: its logits are what was asked for."""
    model = TableModel(TABLE)
    sequence = model.sequence()
    if held:
        advance(model, sequence, held)
    computed = []
    model.on_forward = computed.extend
    rows = catch_up(model, sequence, wanted)
    assert computed == wanted[shared:]
    assert sequence.token_ids == wanted
    np.testing.assert_array_equal(rows, fresh(wanted))


def test_catch_up_takes_chunks_and_announces_each():
    model = TableModel(TABLE, chunk_size=4)
    sizes, seen = [], []
    model.on_forward = lambda ids: sizes.append(len(ids))
    catch_up(model, model.sequence(), list(range(10)), on_chunk=lambda done, wanted: seen.append((done, wanted)))
    assert sizes == [4, 4, 2]
    assert seen == [(0, 10), (4, 10), (8, 10)]


def test_a_cancelled_chunk_leaves_those_before_it():
    class StopError(Exception):
        pass

    def stop_at_eight(done: int, wanted: int) -> None:
        if done == 8:
            raise StopError

    model = TableModel(TABLE, chunk_size=4)
    sequence = model.sequence()
    with pytest.raises(StopError):
        catch_up(model, sequence, list(range(10)), on_chunk=stop_at_eight)
    assert sequence.token_ids == list(range(8))


def test_random_walks_equal_a_fresh_model():
    """Any history of tokens, rollbacks and chunk sizes gives the logits of a model that saw only the last ones."""
    random = np.random.default_rng(0)
    for chunk_size in (1, 3, 64):
        model = TableModel(TABLE, chunk_size=chunk_size)
        sequence = model.sequence()
        for _ in range(200):
            wanted = random.integers(0, 3, random.integers(1, 12)).tolist()
            np.testing.assert_array_equal(catch_up(model, sequence, wanted), fresh(wanted))
            sequence.rollback(int(random.integers(0, sequence.num_tokens + 1)))


def test_common_beginnings_are_counted_as_a_loop_counts_them():
    random = np.random.default_rng(0)
    for _ in range(500):
        ids, others = (random.integers(0, 2, random.integers(0, 9)).tolist() for _ in range(2))
        pairs = enumerate(zip(ids, others, strict=False))
        wanted = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(others)))
        for start in range(wanted + 1):
            assert num_common(ids, others, start) == wanted
