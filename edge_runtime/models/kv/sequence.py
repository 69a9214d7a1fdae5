"""The sequences of one model: those in use, each a value of its own, and what is kept of those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_runtime.models.kv.folder import PrefixFolder
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.store import Prefix, PrefixStore
from edge_runtime.models.kv.table import BlockTable


class PagedSequence(Prefix):
    """Tokens, and in each group of layers the blocks that hold their keys and values; implements `base.Sequence`.

    Args:
        sequences: All of the model.
        token_ids: Ids of the tokens that it holds already.
        tables: Their blocks.
    """

    def __init__(self, sequences: Sequences, token_ids: list[int], tables: Sequence[BlockTable]) -> None:
        super().__init__(token_ids, tables)
        self._sequences = sequences

    def reserve(self, num_tokens: int) -> None:
        """Announce that up to `num_tokens` tokens may be held, so that memory is found before the work starts."""
        for table in self.tables:
            table.reserve(min(num_tokens, self._sequences.context_length))

    def fork(self, num_tokens: int | None = None) -> PagedSequence:
        """Return a sequence that holds the same beginning and goes its own way.

        Args:
            num_tokens: Leading tokens to hold; None for all. Where what they see is gone, the fork holds none.
        """
        return self._sequences.fork(self, self.num_tokens if num_tokens is None else num_tokens)

    def close(self) -> None:
        """Hold nothing any more; what was held is kept for a later sequence, while there is room."""
        self._sequences.close(self)

    def discard(self) -> None:
        """Hold nothing any more, nor let anything be kept that may share its blocks, which may be NaN."""
        self._sequences.discard(self)

    def assume(self, num_tokens: int) -> None:
        """Take so many tokens for held without computing them, to measure what a step after them costs.

        What follows is meaningless, and no later sequence gets it.
        """
        self._sequences.hide(self)
        for past in range(self.num_tokens, num_tokens, 512):
            end = min(past + 512, num_tokens)
            for table in self.tables:
                table.hold(past, end)
            self.token_ids += [0] * (end - past)


class Sequences:
    """The sequences of one model.

    Args:
        pools: The blocks of each group of layers.
        context_length: Most tokens of a sequence.
        max_kept_bytes: Most bytes that are kept of closed ones.
        folder: Where they outlive the process; None for nowhere.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        context_length: int,
        max_kept_bytes: int,
        folder: PrefixFolder | None = None,
    ) -> None:
        self.pools, self.context_length, self._folder = pools, context_length, folder
        self.store = PrefixStore(pools, max_kept_bytes, *([folder.save] if folder else []))
        self._open: list[PagedSequence] = []

    def open(self, token_ids: list[int]) -> PagedSequence:
        """Return a new sequence, which holds as much of the beginning of `token_ids` as is still held anywhere."""
        source, count = self.store.longest(token_ids, self._open)
        if self._folder and (file := self._folder.longest(token_ids, count + self.pools[0].block_size)):
            self.keep(self._folder.load(file))
            source, count = self.store.longest(token_ids, self._open)
        return self._add(token_ids[:count], source.share(count) if source else self._empty())

    def fork(self, source: PagedSequence, num_tokens: int) -> PagedSequence:
        """Return a sequence that holds the first `num_tokens` tokens of another, or none where that cannot be."""
        if source.can_keep(num_tokens):
            return self._add(source.token_ids[:num_tokens], source.share(num_tokens))
        return self._add([], self._empty())

    def hide(self, sequence: PagedSequence) -> None:
        """Give nothing of a sequence to others, now or when it is closed."""
        if sequence in self._open:
            self._open.remove(sequence)

    def close(self, sequence: PagedSequence) -> None:
        """Take from a sequence what it holds, and keep it if there is room."""
        held = Prefix(sequence.token_ids, sequence.tables)
        sequence.token_ids, sequence.tables = [], ()
        for table in held.tables:
            table.rollback(held.num_tokens)  # what a forward that failed had taken
        if sequence in self._open and held.num_tokens:
            self.store.add(held)
        else:
            held.release()
        self.hide(sequence)

    def keep(self, prefix: Prefix | None) -> int:
        """Keep what a file held, if anything; return how many tokens it is."""
        count = prefix.num_tokens if prefix else 0
        if prefix:
            self.store.add(prefix)
        return count

    def end(self) -> None:
        """Close all sequences and keep nothing any more, but for what a folder keeps."""
        for sequence in list(self._open):
            self.close(sequence)
        self.store.clear()
        if self._folder:
            self._folder.finish()

    def discard(self, sequence: PagedSequence) -> None:
        """Take from a sequence what it holds, and drop all that is kept and begins alike."""
        self.store.drop_like(sequence.token_ids)
        if self._folder:
            self._folder.forget(sequence.token_ids)
        self.hide(sequence)
        self.close(sequence)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(pool.num_bytes for pool in self.pools)

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token takes where every layer sees everything."""
        return sum(pool.num_kv_heads * pool.memory.block_bytes // pool.block_size for pool in self.pools)

    def report(self) -> dict[str, Any]:
        """Return what is allocated and kept."""
        kept = {"sequences": len(self.store), "bytes": self.store.num_bytes, "max_bytes": self.store.max_bytes}
        return {"kv_bytes": self.num_bytes, "prefix_cache": kept}

    def _add(self, token_ids: list[int], tables: list[BlockTable]) -> PagedSequence:
        made = PagedSequence(self, token_ids, tables)
        self._open.append(made)
        return made

    def _empty(self) -> list[BlockTable]:
        return [BlockTable(pool) for pool in self.pools]
