"""Sequences of one model share what they share and nothing else: each gives the logits that it gives alone.

For OpenVINO's attention, and for ours with layers that see everything, a window and sinks, or shards.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.config import LoadConfig
from edge_runtime.manifest import load_manifest
from edge_runtime.models.attention import AttentionPattern, LayerPattern, longgen, s2
from edge_runtime.models.base import Span, advance, catch_up
from edge_runtime.models.kv.sequence import PagedSequence
from edge_runtime.models.loading import load_model
from edge_runtime.models.paged import PagedModel

pytestmark = pytest.mark.kernels

EXACT = 1e-5
"""Largest difference of f32 logits, relative to the largest: order of sums."""
BLOCK = 16
KINDS: dict[str, str | AttentionPattern] = {
    "stock": "stock",
    "full": "block_sparse",
    "longgen": longgen(2, sink=20, window=48, num_full=1, block_size=BLOCK),
    "strided": AttentionPattern.of_layers([LayerPattern(window=32, stride=3, sink=4)] * 2, BLOCK),
    "s2": s2(2, 2, window=32, stride=2, block_size=BLOCK),
    "by tokens": AttentionPattern.of_layers([LayerPattern(window=37, by_tokens=True)] * 2, BLOCK),
    "query shards": AttentionPattern.of_layers(
        [LayerPattern(window=16, stride=4, offsets=(0, 1, 2, 3), num_dense_heads=1)] * 2, BLOCK
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tiny_ir, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    kind = KINDS[request.param]
    if isinstance(kind, str):
        return tiny_ir("llama"), {"attention": kind}
    copy = tmp_path_factory.mktemp("pattern") / "ir"
    shutil.copytree(tiny_ir("llama"), copy)
    dataclasses.replace(load_manifest(copy), attention=kind).save(copy)
    return copy, {}


def load(folder: tuple[Path, dict[str, Any]], **options: Any) -> PagedModel:
    path, more = folder
    model = load_model(path, load_manifest(path), LoadConfig(precision="f32", **more, **options))
    assert isinstance(model, PagedModel)
    return model


@pytest.fixture
def model(folder) -> PagedModel:
    return load(folder)


@pytest.fixture(scope="module")
def fresh(folder) -> PagedModel:
    """Keeps nothing, and never has two sequences."""
    return load(folder, prefix_cache_bytes=0)


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def assert_right(fresh: PagedModel, sequence: PagedSequence, rows: np.ndarray) -> None:
    """Compare the last rows of logits of a sequence with those of a model that saw nothing else."""
    alone = fresh.sequence()
    wanted = advance(fresh, alone, list(sequence.token_ids), len(rows))
    assert np.abs(rows - wanted).max() <= EXACT * np.abs(wanted).max()
    assert rows.argmax(axis=-1).tolist() == wanted.argmax(axis=-1).tolist()
    alone.close()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 128])
def test_forks_go_their_own_ways(model, fresh, length):
    """Both write into the block that they share, the first one copies it; whole blocks stay shared."""
    first = model.sequence()
    advance(model, first, ids(length))
    second, third = first.fork(), first.fork()
    for seed, sequence in enumerate((first, second, third)):
        assert sequence.token_ids == ids(length)
        assert_right(fresh, sequence, advance(model, sequence, ids(20, seed), 20).copy())
    for sequence in (first, second, third):
        assert_right(fresh, sequence, advance(model, sequence, [7]).copy())


@pytest.mark.parametrize("length", [12, 100])
def test_what_is_written_after_a_rollback_reaches_no_fork(model, fresh, length):
    """The block that the two share is full for one of them from a place that the other still needs."""
    first = model.sequence()
    advance(model, first, ids(length))
    fork = first.fork()
    assert first.rollback(length - 3) == length - 3
    assert_right(fresh, first, advance(model, first, ids(3, 1), 3).copy())
    for sequence in (fork, first):
        assert_right(fresh, sequence, advance(model, sequence, [7]).copy())


def test_a_fork_may_begin_before_the_end(model, fresh):
    """Or holds nothing, where a window has forgotten what that place needs."""
    first = model.sequence()
    catch_up(model, first, ids(150))
    for place in (150, 149, 145, 140, 60, 3):
        fork = first.fork(place)
        assert fork.num_tokens == (place if first.can_keep(place) else 0)
        assert first.can_keep(place) or any(not pool.pattern.is_full for pool in model._sequences.pools)
        assert place < 140 or fork.num_tokens == place
        assert_right(fresh, fork, catch_up(model, fork, [*ids(place), 5, 6]).copy())
        fork.close()
    assert_right(fresh, first, advance(model, first, [9]).copy())


def test_one_forward_of_several_sequences_equals_each_alone(model, fresh):
    """Prompts beside answers beside drafted blocks, of sequences of different lengths, in changing company."""
    chance, sequences = random.Random(0), [model.sequence() for _ in range(6)]
    for step in range(25):
        chosen = chance.sample(sequences, chance.randint(1, 5))
        spans = []
        for sequence in chosen:
            width = chance.choice([1, 1, 1, 4, 9, 33])
            spans.append(Span(sequence, ids(width, chance.randrange(99)), chance.randint(1, width)))
        outputs = [output.logits.copy() for output in model.forward(spans)]
        for span, rows in zip(spans, outputs, strict=True):
            assert rows.shape == (span.num_rows, model.vocab_size)
            if step % 3 == 0:
                assert_right(fresh, span.sequence, rows)
        for sequence in sequences:
            sequence.rollback(max(0, sequence.num_tokens - chance.choice([0, 0, 1, 3])))


def test_the_next_turn_holds_all_of_the_last(model, fresh):
    """But for the last token of what is wanted; several chats in turns, each finds its own."""
    chats = [ids(90, seed) for seed in range(3)]
    for turn in range(4):
        for number, chat in enumerate(chats):
            sequence = model.sequence(chat)
            assert sequence.num_tokens == (len(chat) - 10 if turn else 0)
            assert_right(fresh, sequence, catch_up(model, sequence, chat).copy())
            for token_id in ids(30, 100 + turn + number):
                advance(model, sequence, [token_id])
            chats[number] = [*sequence.token_ids, *ids(10, 200 + number)]
            sequence.close()


def test_the_same_prompt_is_held_but_for_its_last_token(model, fresh):
    sequence = model.sequence(ids(70))
    catch_up(model, sequence, ids(70))
    again = model.sequence(ids(70))  # of a sequence in use
    assert again.num_tokens == 69
    sequence.close()
    once_more = model.sequence(ids(70))  # and of one that was closed
    assert once_more.num_tokens == 69
    for one in (again, once_more):
        assert_right(fresh, one, catch_up(model, one, ids(70)).copy())
    assert (model.sequence().num_tokens, model.sequence([3]).num_tokens) == (0, 0)


@pytest.mark.parametrize("shared", [1, 15, 16, 17, 31, 32, 64, 100, 101])
def test_what_begins_alike_is_right_however_much_is_shared(model, fresh, shared):
    """After an answer of any length: what a window has forgotten is not held, and never guessed."""
    for answer in (1, 8, 20, 100):
        first = model.sequence()
        catch_up(model, first, ids(101))
        for token_id in ids(answer, 1):
            advance(model, first, [token_id])
        first.close()
        wanted = [*ids(shared), *ids(12, 2)]
        second = model.sequence(wanted)
        assert second.num_tokens in (0, shared)
        if all(pool.pattern.is_full for pool in model._sequences.pools):
            assert second.num_tokens == shared
        assert_right(fresh, second, catch_up(model, second, wanted).copy())
        second.rollback(0)
        second.close()
        model._sequences.store.clear()


def test_a_window_that_has_moved_on_holds_nothing_of_the_beginning(folder):
    """Of three chats that begin alike, each still finds its own end."""
    model = load(folder)
    has_windows = not all(pool.pattern.is_full for pool in model._sequences.pools)
    chats = [[*ids(60), *ids(150, seed)] for seed in (1, 2, 3)]
    for chat in chats:
        sequence = model.sequence(chat)
        assert sequence.num_tokens == (0 if has_windows or chat is chats[0] else 60)
        for begin in range(sequence.num_tokens, 210, 10):
            advance(model, sequence, chat[begin : begin + 10])
        sequence.close()
    for chat in chats:
        assert model.sequence([*chat, 5, 6]).num_tokens == 210


def test_all_blocks_come_back(folder):
    model = load(folder)
    pools, chance = model._sequences.pools, random.Random(1)
    for seed in range(12):
        sequence = model.sequence(ids(80, seed % 3))
        catch_up(model, sequence, [*ids(80, seed % 3), *ids(chance.randint(1, 60), seed)])
        fork = sequence.fork(chance.randint(0, sequence.num_tokens))
        advance(model, fork, ids(30))
        for one in (sequence, fork) if chance.random() < 0.5 else (fork, sequence):
            one.close()
            one.close()
    assert model.report()["prefix_cache"]["sequences"] > 3
    model._sequences.store.clear()
    for pool in pools:
        assert not pool.refs.any() and not pool.tables and not pool.kept_bytes
        assert sorted(pool._free) == list(range(pool.num_blocks))


def test_a_forward_that_fails_leaves_every_sequence_as_it_was(model, fresh, monkeypatch):
    first, second = model.sequence(), model.sequence()
    advance(model, first, ids(40))
    advance(model, second, ids(20, 1))
    fork = first.fork()
    with monkeypatch.context() as patch:

        def fail() -> None:
            raise RuntimeError("out of memory")

        patch.setattr(model, "_infer", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                model.forward([Span(first, ids(200, 2)), Span(second, ids(70, 3)), Span(fork, [4])])
    assert [one.token_ids for one in (first, second, fork)] == [ids(40), ids(20, 1), ids(40)]
    outputs = model.forward([Span(second, [5]), Span(fork, [6]), Span(first, [7], 1)])
    rows = [output.logits.copy() for output in outputs]
    for one, row in zip((second, fork, first), rows, strict=True):
        assert_right(fresh, one, row)


def test_what_a_freed_block_held_is_never_read(model, fresh):
    """NaN, say, that an answer which went wrong has left: behind the last token, and before the window."""
    model.sequence().reserve(400)
    for pool in model._sequences.pools:
        pool.make_room(300, is_narrow=False)
        for tensor in pool.memory._memory:
            tensor[...] = 0xFF
    first, second = model.sequence(), model.sequence()
    for width in (1, 40, 1, 1, 9, 100, 1):
        outputs = model.forward([Span(first, ids(width, 1), width), Span(second, ids(width + 1, 2))])
        for sequence, output in zip((first, second), [output.logits.copy() for output in outputs], strict=True):
            assert_right(fresh, sequence, output)


def test_what_was_only_assumed_is_given_to_nobody(model):
    sequence = model.sequence()
    sequence.assume(400)
    assert sequence.num_tokens == 400
    advance(model, sequence, [5])
    assert model.sequence([0] * 50).num_tokens == 0
    sequence.close()
    assert model.sequence([0] * 50).num_tokens == 0
