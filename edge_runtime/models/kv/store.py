"""What closed sequences held, kept for those that begin alike: the next turn of a chat, the same instructions again.

Entries share blocks with each other and with the sequences in use, so what counts is the blocks, each once. The entry
that was not used for longest is dropped first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from edge_runtime.models.base import num_common
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.table import BlockTable

MOST_ENTRIES = 64
"""A choice: more would make looking through them cost as much as a short prompt."""


class Prefix:
    """Tokens with their keys and values, from which sequences are continued.

    Args:
        token_ids: Ids of the tokens.
        tables: Their blocks, for each group of layers.

    Attributes:
        token_ids: Ids of the tokens held; not to be changed.
        tables: Their blocks, for each group of layers.
    """

    def __init__(self, token_ids: list[int], tables: Sequence[BlockTable]) -> None:
        self.token_ids, self.tables = token_ids, tables

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return len(self.token_ids)

    def can_keep(self, num_tokens: int) -> bool:
        """Whether a token after the first `num_tokens` finds all that it sees, which windows may have forgotten."""
        return all(table.can_keep(num_tokens) for table in self.tables)

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens, or none where what they see is gone; forget the rest; return the kept."""
        if num_tokens < len(self.token_ids):
            if not self.can_keep(num_tokens):
                num_tokens = 0
            for table in self.tables:
                table.rollback(num_tokens)
            del self.token_ids[num_tokens:]
        return len(self.token_ids)

    def share(self, num_tokens: int) -> list[BlockTable]:
        """Return tables of the first `num_tokens` tokens, which `can_keep` has agreed to."""
        return [table.fork(num_tokens) for table in self.tables]

    def release(self) -> None:
        """Hold nothing any more, for good."""
        for table in self.tables:
            table.release()
        self.token_ids, self.tables = [], ()


class PrefixStore:
    """The prefixes that one model keeps.

    Args:
        pools: Whose blocks they hold.
        max_bytes: Most bytes of blocks that they hold together.
        on_leave: Called with each prefix that has to leave because of its age or size.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        max_bytes: int,
        on_leave: Callable[[Prefix], object] = lambda prefix: None,
    ) -> None:
        self.max_bytes, self._on_leave = max_bytes, on_leave
        self._pools = pools
        self._entries: list[Prefix] = []  # the last used is the last

    def __len__(self) -> int:
        """Return how many prefixes are kept."""
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks that are kept, each counted once."""
        return sum(pool.kept_bytes for pool in self._pools)

    def longest(self, token_ids: list[int], others: Iterable[Prefix]) -> tuple[Prefix | None, int]:
        """Return what shares the most leading tokens and can be continued after them, and how many they are.

        Args:
            token_ids: What is wanted; its last token is left out.
            others: Prefixes that are not in the store.
        """
        best, found = 0, None
        for entry in [*others, *reversed(self._entries)]:
            if entry.num_tokens > best and entry.token_ids[: best + 1] == token_ids[: best + 1]:
                count = min(num_common(token_ids, entry.token_ids, best + 1), len(token_ids) - 1)
                if count > best and entry.can_keep(count):
                    best, found = count, entry
        if found in self._entries:
            self._entries.remove(found)
            self._entries.append(found)
        return found, best

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix, in the place of those that it begins with; it belongs to the store from now on."""
        if any(_replaces(entry, prefix) for entry in self._entries):
            prefix.release()
            return
        for entry in [entry for entry in self._entries if _replaces(prefix, entry)]:
            self._drop(entry)
        self._entries.append(prefix)
        for table in prefix.tables:
            table.keep(1)
        while len(self._entries) > MOST_ENTRIES or self.num_bytes > self.max_bytes:
            oldest = self._entries[0]
            if oldest is not prefix:
                self._leave(oldest)
            elif not self._shorten(prefix):
                self._drop(prefix)

    def drop_like(self, token_ids: list[int]) -> None:
        """Drop what begins with the same token, as all do that share blocks."""
        for entry in [entry for entry in self._entries if entry.token_ids[:1] == token_ids[:1]]:
            self._drop(entry)

    def clear(self) -> None:
        """Keep nothing."""
        for entry in list(self._entries):
            self._leave(entry)

    def _shorten(self, entry: Prefix) -> bool:
        """Keep only the beginning of the last entry, for which there is room; return False where that is none."""
        size = self._pools[0].block_size
        block_bytes = sum(pool.num_kv_heads * pool.memory.block_bytes for pool in self._pools)
        excess = -(-(self.num_bytes - self.max_bytes) // block_bytes)
        count = (-(-entry.num_tokens // size) - excess) * size
        if count <= 0 or not entry.can_keep(count):
            return False
        for table in entry.tables:
            table.keep(-1)
        entry.rollback(count)
        for table in entry.tables:
            table.keep(1)
        return True

    def _leave(self, entry: Prefix) -> None:
        self._on_leave(entry)
        self._drop(entry)

    def _drop(self, entry: Prefix) -> None:
        self._entries.remove(entry)
        for table in entry.tables:
            table.keep(-1)
        entry.release()


def _replaces(prefix: Prefix, other: Prefix) -> bool:
    """Whether all that one prefix is good for can also be had from another."""
    count = other.num_tokens
    return prefix.token_ids[:count] == other.token_ids and prefix.can_keep(count)
