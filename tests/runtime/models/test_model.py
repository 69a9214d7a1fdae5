"""The cache knows which tokens it holds: a new sequence computes only what it does not share."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.models.base import CachedModel
from tests.runtime.fakes import TableModel, random_table

V = 12
TABLE = random_table(V, 1)


def cached(chunk_size: int = 64) -> CachedModel:
    return CachedModel(TableModel(TABLE), chunk_size)


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
    model = cached()
    if held:
        model.forward(held)
    assert model.shared(wanted) == shared
    computed = []
    model.model.on_forward = computed.extend
    rows = model.catch_up(wanted)
    assert computed == wanted[shared:]
    assert model.token_ids == wanted
    np.testing.assert_array_equal(rows, cached().catch_up(wanted))


def test_catch_up_takes_chunks_and_announces_each():
    model = cached(chunk_size=4)
    sizes, seen = [], []
    model.model.on_forward = lambda ids: sizes.append(len(ids))
    model.catch_up(list(range(10)), on_chunk=lambda done, wanted: seen.append((done, wanted)))
    assert sizes == [4, 4, 2]
    assert seen == [(0, 10), (4, 10), (8, 10)]


def test_a_cancelled_chunk_leaves_those_before_it():
    class StopError(Exception):
        pass

    def stop_at_eight(done: int, wanted: int) -> None:
        if done == 8:
            raise StopError

    model = cached(chunk_size=4)
    with pytest.raises(StopError):
        model.catch_up(list(range(10)), on_chunk=stop_at_eight)
    assert model.token_ids == list(range(8))
    assert model.model.num_tokens == 8


def test_rollback_never_adds_tokens():
    model = cached()
    model.forward([1, 2, 3])
    model.rollback(5)
    assert model.token_ids == [1, 2, 3]
    model.rollback(1)
    assert (model.token_ids, model.model.num_tokens) == ([1], 1)


def test_random_walks_equal_a_fresh_model():
    """Any history of sequences, rollbacks and chunk sizes gives the logits of a model that saw only the last one."""
    random = np.random.default_rng(0)
    for chunk_size in (1, 3, 64):
        model = cached(chunk_size)
        for _ in range(200):
            wanted = random.integers(0, 3, random.integers(1, 12)).tolist()
            np.testing.assert_array_equal(model.catch_up(wanted), cached().catch_up(wanted))
            model.rollback(int(random.integers(0, 12)))
