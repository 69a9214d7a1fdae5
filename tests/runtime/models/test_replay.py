"""What is done to one model, sent as JSON and done to another, leaves both the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime.config import LoadConfig
from edge_runtime.errors import EdgeError
from edge_runtime.manifest import load_manifest
from edge_runtime.models.base import CausalModel, Sequence, Span, advance
from edge_runtime.models.loading import load_model
from edge_runtime.models.replay import Entry, Recording, replay
from tests.runtime.fakes import TableModel, random_table

V = 7


class Follower:
    """Replays entries as they are written, after a trip through JSON.

    Args:
        model: That follows.
    """

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.entries: list[Entry] = []
        self.sequences: dict[int, Sequence] = {}
        self.logits: list[np.ndarray] = []

    def __call__(self, entry: Entry) -> None:
        self.entries.append(json.loads(json.dumps(entry)))
        outputs = replay(self.entries[-1], self.model, self.sequences)
        self.logits = [output.logits.copy() for output in outputs]


@pytest.fixture(params=["fake", "paged"])
def make(request, tiny_ir) -> Callable[[], Any]:
    """Return a function to a new model, the same every time."""
    if request.param == "fake":
        return lambda: TableModel(random_table(V, 0))
    folder = tiny_ir("llama")
    return lambda: load_model(folder, load_manifest(folder), LoadConfig(precision="f32"))


def test_a_follower_computes_what_the_first_computes(make):
    """Two sequences in one step, drafts accepted and rejected, one closed and begun again by what it held."""
    follower = Follower(make())
    model, random = Recording(make(), follower), np.random.default_rng(0)
    prompts = [random.integers(0, V, length).tolist() for length in (20, 9)]
    sequences = [model.sequence(prompt) for prompt in prompts]
    sequences[0].reserve(100)

    def step(spans: list[Span]) -> None:
        outputs = model.forward(spans)
        for output, logits in zip(outputs, follower.logits, strict=True):
            np.testing.assert_array_equal(output.logits, logits)

    step([Span(sequence, prompt) for sequence, prompt in zip(sequences, prompts, strict=True)])
    for turn in range(20):
        drafted = [random.integers(0, V, width).tolist() for width in random.integers(1, 6, 2)]
        step([Span(sequence, ids, len(ids)) for sequence, ids in zip(sequences, drafted, strict=True)])
        for sequence, ids in zip(sequences, drafted, strict=True):
            sequence.rollback(sequence.num_tokens - int(random.integers(0, len(ids))))
        if turn == 10:
            ids = [*sequences[1].token_ids, 1, 2]
            sequences[1].close()
            sequences[1] = model.sequence(ids)
            assert sequences[1].num_tokens >= 9
        numbers = [0, max(follower.sequences)]
        assert [follower.sequences[number].token_ids for number in numbers] == [each.token_ids for each in sequences]
    assert {entry[0] for entry in follower.entries} == {"open", "rollback", "forward", "close"}


def test_the_forward_is_written_before_it_is_computed():
    """Ranks that share a model compute together: the others cannot wait for the first to be done."""
    seen: list[str] = []
    table = TableModel(random_table(V, 0))
    table.on_forward = lambda token_ids: seen.append("computed")
    model = Recording(table, lambda entry: seen.append(entry[0]))
    advance(model, model.sequence(), [1, 2])
    assert seen == ["open", "forward", "computed"]


def test_a_follower_does_not_go_on_after_a_forward_that_failed():
    follower, table = Follower(TableModel(random_table(V, 0))), TableModel(random_table(V, 0))
    model = Recording(table, follower)
    sequence = model.sequence()
    advance(model, sequence, [1, 2])

    def fail(token_ids: list[int]) -> None:
        raise MemoryError

    table.on_forward = fail
    with pytest.raises(MemoryError):
        advance(model, sequence, [3])
    assert follower.sequences[0].token_ids == sequence.token_ids == [1, 2]


def test_a_follower_that_kept_other_prefixes_holds_the_same():
    """The first knew the prompt's beginning; the follower has seen less of it, or all of it."""
    for known in ([1, 2], [1, 2, 3, 4, 5, 6]):
        first, other = (TableModel(random_table(V, 0)) for _ in range(2))
        follower = Follower(other)
        for model, ids in ((first, [1, 2, 3, 4]), (other, known)):
            sequence = model.sequence()
            advance(model, sequence, ids)
            sequence.close()
        assert Recording(first, follower).sequence([1, 2, 3, 4, 5, 6]).num_tokens == 4
        assert follower.sequences[0].token_ids == [1, 2, 3, 4]


def test_a_follower_that_has_lost_a_sequence_says_so():
    model = TableModel(random_table(V, 0))
    sequences: dict[int, Sequence] = {0: model.sequence()}
    with pytest.raises(EdgeError, match="sequence 0 holds 0 tokens here, expected 5"):
        replay(["rollback", 0, 5], model, sequences)


def test_a_recording_is_a_model_like_any_other(make):
    model = make()
    recording: CausalModel = Recording(model, lambda entry: None)
    for name in ("vocab_size", "context_length", "device", "max_sequences", "chunk_size", "token_kv_bytes", "kv_bytes"):
        assert getattr(recording, name) == getattr(model, name)
    assert recording.report() == model.report()
    recording.close()
