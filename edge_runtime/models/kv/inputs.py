"""The inputs of a forward that say which blocks belong to which of its sequences.

The buffers stay bound. A step writes how many tokens each sequence holds, and the blocks only of those sequences whose
table changed since, which in decoding happens once a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.models.kv.pool import GROWTH, BlockPool
from edge_runtime.models.kv.table import BlockTable
from edge_runtime.models.passes.block_sparse_attention import block_table_input


class BlockInputs:
    """The inputs that both kinds of attention have, for the sequences of one forward.

    Args:
        request: Whose inputs are bound.
        pools: One for each group of layers.
    """

    def __init__(self, request: ov.InferRequest, pools: Sequence[BlockPool]) -> None:
        self._request = request
        self._heads = [pool.num_kv_heads for pool in pools]
        self._alive: dict[str, NDArray[np.int32]] = {}
        self._count = self._rows = self._width = 0
        self._past_lens, self._max_context_len = np.zeros(0, np.int32), np.zeros((), np.int32)
        self._tables: list[NDArray[np.int32]] = []
        self._versions: list[list[int]] = []

    def write(self, spans: Sequence[tuple[Any, ...]], longest: int) -> None:
        """Let the next inference compute these spans.

        Args:
            spans: Each a `base.Span` of a sequence that has blocks for its tokens.
            longest: Tokens of the longest, those computed next included.
        """
        self._max_context_len[()] = longest
        if len(spans) != self._count:
            self._past_lens = self._set("past_lens", np.zeros(len(spans), np.int32))
            self._bind(len(spans), max(1, self._width))
        for row, (sequence, _, _) in enumerate(spans):
            self._past_lens[row] = len(sequence.token_ids)
            versions = self._versions[row]
            for table in sequence.tables:
                if table.version not in versions:
                    self._write_tables(row, sequence.tables)
                    break

    def _write_tables(self, row: int, tables: Sequence[BlockTable]) -> None:
        widest = max(table.table.shape[1] for table in tables)
        if widest > self._width:
            self._bind(self._count, max(widest, int(self._width * GROWTH)))
        for target, table in zip(self._tables, tables, strict=True):
            width = table.table.shape[1]
            target[row, :, :width] = table.table
            target[row, :, width:] = -1
        self._versions[row] = [table.version for table in tables]

    def _bind(self, count: int, width: int) -> None:
        """Bind buffers for so many sequences of so many blocks; rows that are there already keep their content."""
        if count > self._rows or width > self._width:
            rows, more = max(count, self._rows), width - self._width
            old = self._tables or [np.zeros((0, heads, 0), np.int32) for heads in self._heads]
            edges = ((0, rows - self._rows), (0, 0), (0, more))
            self._tables = [np.pad(table, edges, constant_values=-1) for table in old]
            self._versions += [[] for _ in range(rows - self._rows)]
            self._rows, self._width = rows, width
        self._count = count
        self._bind_tables([table[:count] for table in self._tables])

    def _bind_tables(self, tables: list[NDArray[np.int32]]) -> None:
        raise NotImplementedError

    def _set(self, name: str, values: NDArray[np.int32]) -> NDArray[np.int32]:
        self._alive[name] = values  # the tensor only points into it
        self._request.set_tensor(name, ov.Tensor(values, shared_memory=True))
        return values


class OwnInputs(BlockInputs):
    """The inputs of BlockSparseAttention: a table (B, H_kv, n) for each group of layers."""

    def _bind_tables(self, tables: list[NDArray[np.int32]]) -> None:
        for number, table in enumerate(tables):
            self._set(block_table_input(number), table)


class StockInputs(BlockInputs):
    """The inputs of PagedAttention: the blocks of all sequences in one list, in which each has room for n."""

    def __init__(self, request: ov.InferRequest, pools: Sequence[BlockPool]) -> None:
        super().__init__(request, pools)
        self._set("max_context_len", self._max_context_len)

    def _bind_tables(self, tables: list[NDArray[np.int32]]) -> None:
        (table,) = tables
        self._set("block_indices", table.reshape(-1))
        self._set("block_indices_begins", np.arange(0, table.size + 1, self._width, dtype=np.int32))
