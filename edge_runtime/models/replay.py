"""A step that is written down and replayed: one process decides, and others that hold a share of the model follow.

`Recording` wraps a model and writes what is done to it as entries that JSON can hold; `replay` does an entry to another
model. A follower that starts from the same state ends in it after every entry, and computes the same logits.

    ["open", number, token_ids, num_held]               a new sequence, and how many of these tokens it holds already
    ["rollback", number, num_tokens]                    what is kept
    ["forward", [[number, token_ids, num_rows], …]]     written before it is computed, so that all compute at once
    ["close", number]
    ["discard", number]

Memory is each process's own matter, so `reserve` is not written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeError
from edge_runtime.models.base import CausalModel, Output, Sequence, Span, catch_up

Entry = list[Any]


class RecordedSequence:
    """A sequence of a model that is recorded; implements `base.Sequence`.

    Args:
        sequence: The model's own.
        number: Its name in the entries.
        write: Called with each entry.
    """

    def __init__(self, sequence: Sequence, number: int, write: Callable[[Entry], object]) -> None:
        self.sequence, self.number, self._write = sequence, number, write

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens held."""
        return self.sequence.token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self.sequence.num_tokens

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept."""
        kept = self.sequence.rollback(num_tokens)
        self._write(["rollback", self.number, kept])
        return kept

    def reserve(self, num_tokens: int) -> None:
        """Announce that up to `num_tokens` tokens may be held."""
        self.sequence.reserve(num_tokens)

    def close(self) -> None:
        """Hold nothing any more."""
        self.sequence.close()
        self._write(["close", self.number])

    def discard(self) -> None:
        """Hold nothing any more, nor let anything be kept that may be NaN."""
        self.sequence.discard()
        self._write(["discard", self.number])


class Recording:
    """A model whose steps are written down; implements `base.CausalModel`.

    Args:
        model: What computes.
        write: Called with each entry, in order.
    """

    def __init__(self, model: CausalModel, write: Callable[[Entry], object]) -> None:
        self._model, self._write, self._num_opened = model, write, 0
        self.vocab_size, self.context_length, self.device = model.vocab_size, model.context_length, model.device
        self.max_sequences, self.chunk_size = model.max_sequences, model.chunk_size

    def sequence(self, token_ids: list[int] | None = None) -> RecordedSequence:
        """Return a new sequence, which may hold a beginning of `token_ids` already."""
        made = RecordedSequence(self._model.sequence(token_ids), self._num_opened, self._write)
        self._num_opened += 1
        self._write(["open", made.number, list(token_ids or []), made.num_tokens])
        return made

    def forward(self, spans: list[Span]) -> list[Output]:
        """Append tokens to sequences; return an output for each span.

        Where it raises, what the sequences hold then is written too: a follower may have got further.
        """
        own = [(_recorded(span.sequence), span) for span in spans]
        self._write(["forward", [[sequence.number, span.token_ids, span.num_rows] for sequence, span in own]])
        try:
            return self._model.forward([span._replace(sequence=sequence.sequence) for sequence, span in own])
        except BaseException:
            for sequence, _ in own:
                self._write(["rollback", sequence.number, sequence.num_tokens])
            raise

    def save(self, path: Path, token_ids: list[int]) -> None:
        """Write keys and values to a file, which changes nothing that a follower should know."""
        self._model.save(path, token_ids)

    def load(self, path: Path) -> int:
        """Keep what a file holds; a follower computes it."""
        return self._model.load(path)

    def close(self) -> None:
        """Give the memory back; the model is not used any more."""
        self._model.close()

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._model.kv_bytes

    @property
    def token_kv_bytes(self) -> int:
        """Bytes that one more token takes."""
        return self._model.token_kv_bytes

    def report(self) -> dict[str, Any]:
        """Return how the model really runs."""
        return self._model.report()


def replay(entry: Entry, model: CausalModel, sequences: dict[int, Sequence]) -> list[Output]:
    """Do to a model what was done to the one that was recorded.

    Args:
        entry: What `Recording` wrote.
        model: The follower.
        sequences: Its open sequences by number, kept up to date.

    Returns:
        What a forward returns; nothing for other entries.

    Raises:
        EdgeError: The follower has lost what the other still holds.
    """
    kind, *rest = entry
    if kind == "forward":
        return model.forward([Span(sequences[number], ids, num_rows) for number, ids, num_rows in rest[0]])
    number = rest[0]
    if kind == "open":
        sequences[number] = _open(model, *rest[1:])
    elif kind == "rollback":
        sequences[number].rollback(rest[1])
        if (kept := sequences[number].num_tokens) != rest[1]:
            raise EdgeError(f"sequence {number} holds {kept} tokens here, expected {rest[1]}", "open it again")
    elif kind == "close":
        sequences.pop(number).close()
    elif kind == "discard":
        sequences.pop(number).discard()
    return []


def _open(model: CausalModel, token_ids: list[int], num_held: int) -> Sequence:
    """Return a sequence that holds the first `num_held` tokens, which are read where this model has fewer."""
    sequence = model.sequence(token_ids)
    if sequence.num_tokens > num_held:
        sequence.rollback(num_held)
    if sequence.num_tokens < num_held:
        catch_up(model, sequence, token_ids[:num_held])
    return sequence


def _recorded(sequence: Sequence) -> RecordedSequence:
    assert isinstance(sequence, RecordedSequence), "a sequence of another model"
    return sequence
