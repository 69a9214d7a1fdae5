"""One compiled language model behind two verbs: `forward` tokens to logits, `rollback` to forget some.

`CausalModel` is what a device implementation provides (`paged.py`). `CachedModel` adds what all of them need: the
ids of the tokens whose keys and values are held, so that a new prompt that starts like the last one (the next turn of a
chat) is not computed again, and a stopped or cancelled request leaves nothing to repair. Nor does an interrupted one:
how many tokens are held is known by the model alone, and ids are noted before they are computed, so that those of the
tokens held are right at every moment at which an exception may come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class CausalModel(Protocol):
    """A decoder with a KV cache of one sequence.

    Attributes:
        vocab_size: V, the width of the logits.
        context_length: Most tokens that fit.
    """

    vocab_size: int
    context_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held; true even where a call was interrupted."""

    def forward(self, token_ids: list[int], num_rows: int) -> Rows:
        """Append T tokens and return the logits of the last `num_rows`, (num_rows, V): valid until the next call."""

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept.

        Returns num_tokens, or 0 if a windowed layer has already freed keys that position needs.
        """

    def reserve(self, num_tokens: int) -> None:
        """Announce that up to `num_tokens` tokens may come, so that memory is found before the work starts."""

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""


class CachedModel:
    """A model together with the ids of the tokens it holds.

    Args:
        model: The device implementation.
        chunk_size: Most tokens given to one forward.
    """

    def __init__(self, model: CausalModel, chunk_size: int) -> None:
        self.model = model
        self._chunk_size = chunk_size
        self._ids: list[int] = []  # of the tokens held, and after them perhaps some that no longer are

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens held."""
        return self._ids[: self.model.num_tokens]

    def forward(self, token_ids: list[int], num_rows: int = 1) -> Rows:
        """Append tokens; return the last `num_rows` rows of logits, (num_rows, V), valid until the next call."""
        self._ids[self.model.num_tokens :] = token_ids
        return self.model.forward(token_ids, num_rows)

    def warm_up(self) -> None:
        """Run one token: plugins pack weights in the first run, which nobody should wait for in an answer."""
        self.rollback(0)
        self.forward([0])
        self.rollback(0)

    def rollback(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens, or none where the model has not kept what they see; forget the rest."""
        if num_tokens < self.model.num_tokens:
            self.model.rollback(num_tokens)

    def shared(self, token_ids: list[int], start: int = 0) -> int:
        """Return how many leading tokens of `token_ids` are held already.

        Args:
            token_ids: The sequence that is to be continued; at least its last token is left to be fed.
            start: Tokens known to be equal.
        """
        limit = min(self.model.num_tokens, len(self._ids), len(token_ids) - 1)
        same = min(start, limit)
        while same < limit and self._ids[same] == token_ids[same]:
            same += 1
        return same

    def align(self, token_ids: list[int], start: int = 0) -> int:
        """Forget all that does not start `token_ids`; return how many tokens are held after that."""
        self.rollback(self.shared(token_ids, start))
        return self.model.num_tokens

    def catch_up(
        self, token_ids: list[int], start: int = 0, on_chunk: Callable[[int, int], None] | None = None
    ) -> Rows:
        """Hold exactly `token_ids`, computing only what is missing, in chunks.

        Args:
            token_ids: The sequence to hold, at least one token.
            start: Leading tokens known to be held already.
            on_chunk: Called before each chunk with the tokens held and the tokens wanted; may raise to cancel.

        Returns:
            (1, V) logits after the last token, valid until the next call.
        """
        for begin in range(self.align(token_ids, start), len(token_ids), self._chunk_size):
            if on_chunk:
                on_chunk(begin, len(token_ids))
            rows = self.forward(token_ids[begin : begin + self._chunk_size])
        return rows
