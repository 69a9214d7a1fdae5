"""What a compiled model is to the rest of the runtime: sequences, and one forward over spans of several of them.

A model holds no conversation. A `Sequence` is a value: its tokens, and its share of the model's keys and values. One
`forward` appends a span of tokens to each of several sequences and reads the weights once for all of them. What a
closed sequence held is kept while there is room (`kv/store.py`), so a new one that begins with the same tokens, such as
the next turn of a chat, is not computed again.

A model and its sequences are used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class Sequence(Protocol):
    """Tokens whose keys and values a model holds."""

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens held; not to be changed."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept.

        Returns num_tokens, or 0 where a windowed layer no longer has the keys that this position needs.
        """

    def reserve(self, num_tokens: int) -> None:
        """Announce that up to `num_tokens` tokens may be held, so that memory is found before the work starts."""

    def close(self) -> None:
        """Hold nothing any more; the model may keep the keys and values for a later sequence."""

    def discard(self) -> None:
        """Hold nothing any more, nor let the model keep anything that it began with: it may be NaN."""


class Span(NamedTuple):
    """Tokens that one forward appends to one sequence.

    Attributes:
        sequence: Which; no sequence has two spans in a forward.
        token_ids: At least one.
        num_rows: For how many of them, the last ones, logits are wanted; at least one.
    """

    sequence: Sequence
    token_ids: list[int]
    num_rows: int = 1


class Output(NamedTuple):
    """What a forward says of one span, valid until the next forward.

    Attributes:
        logits: (num_rows, V).
        hidden: (num_rows, E) of what the last matrix product is given, then of the layers that the manifest names; None
            unless the model was loaded for it.
    """

    logits: Rows
    hidden: Rows | None = None


class CausalModel(Protocol):
    """A compiled decoder.

    Attributes:
        vocab_size: V, the width of the logits.
        context_length: Most tokens of a sequence.
        device: OpenVINO device that it runs on.
        max_sequences: Most spans of a forward. Where it is 1, a new sequence takes the place of the one before.
        chunk_size: Most tokens of a span that is part of a prompt.
    """

    vocab_size: int
    context_length: int
    device: str
    max_sequences: int
    chunk_size: int

    def sequence(self, token_ids: list[int] | None = None) -> Sequence:
        """Return a new sequence.

        Args:
            token_ids: What it is going to hold. Of these it holds already as many leading tokens as the model still has
                the keys and values of, the last token always left out, so that a forward has something to compute.
        """

    def forward(self, spans: list[Span]) -> list[Output]:
        """Append tokens to sequences; return an output for each span.

        Where it raises, the sequences hold what they held before.

        Raises:
            ContextOverflowError: The context does not hold them.
        """

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    @property
    def token_kv_bytes(self) -> int:
        """Bytes that one more token takes in a sequence whose every layer sees everything."""

    def save(self, path: Path, token_ids: list[int]) -> None:
        """Write the keys and values of some tokens, computed if need be, to a file, whole or not at all.

        Raises:
            ConfigError: The file cannot be written.
            ContextOverflowError: The context does not hold the tokens.
            DeviceError: The device gives its keys and values to nobody.
        """

    def load(self, path: Path) -> int:
        """Keep what `save` wrote, for sequences that begin so; return how many tokens it is.

        Returns 0, with one line in the log, where the file is damaged or of another model.

        Raises:
            DeviceError: The device takes keys and values from nobody.
        """

    def close(self) -> None:
        """Forget all sequences and give the memory back; the model is not used any more."""

    def report(self) -> dict[str, Any]:
        """Return how the model really runs: arithmetic and why, keys and values, threads, added properties."""


def advance(model: CausalModel, sequence: Sequence, token_ids: list[int], num_rows: int = 1) -> Rows:
    """Append tokens to one sequence; return the logits of the last `num_rows`, valid until the next forward."""
    return model.forward([Span(sequence, token_ids, num_rows)])[0].logits


def num_common(ids: list[int], others: list[int], start: int = 0) -> int:
    """Return how many leading tokens two lists share, of which the first `start` are known to be equal."""
    end = min(len(ids), len(others))
    if ids[start:end] == others[start:end]:
        return end
    while end - start > 1:  # equal up to `start`, different before `end`
        middle = (start + end) // 2
        if ids[start:middle] == others[start:middle]:
            start = middle
        else:
            end = middle
    return start


def catch_up(
    model: CausalModel,
    sequence: Sequence,
    token_ids: list[int],
    start: int = 0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Rows:
    """Let a sequence hold exactly `token_ids`, computing only what is missing, in chunks.

    Args:
        model: The sequence's.
        sequence: To be continued, or rolled back first.
        token_ids: The tokens to hold, at least one.
        start: Leading tokens known to be held already.
        on_chunk: Called before each chunk with the tokens held and the tokens wanted; may raise to cancel.

    Returns:
        (1, V) logits after the last token, valid until the next forward.
    """
    same = num_common(sequence.token_ids, token_ids, min(start, sequence.num_tokens))
    sequence.rollback(min(same, len(token_ids) - 1))
    for begin in range(sequence.num_tokens, len(token_ids), model.chunk_size):
        if on_chunk:
            on_chunk(begin, len(token_ids))
        rows = advance(model, sequence, token_ids[begin : begin + model.chunk_size])
    return rows
