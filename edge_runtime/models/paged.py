"""A decoder on CPU or GPU: attention over paged keys and values, driven from Python.

Keys and values lie in tensors that we own and pass as inputs: `paged_cache` for OpenVINO's PagedAttention,
`block_cache` for our own op, whose layers hold only what they still see. A step writes a few numbers into buffers that
stay bound to the request; tensors are bound anew only when the number of tokens or blocks changes.

An exception may come at any instruction (Ctrl-C). Where it comes while the model computes, the tokens held before stay
held, since a step writes behind them only; where it comes while caches or bindings change, the next call begins anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_runtime.errors import ContextOverflowError
from edge_runtime.models.base import Rows
from edge_runtime.models.kv.block_sparse import BlockCache
from edge_runtime.models.kv.stock import KvCache, StockCache
from edge_runtime.models.passes.block_sparse_attention import BlockAttention
from edge_runtime.models.passes.wanted_rows import LOGITS_ROWS
from edge_runtime.models.plan import CompilePlan

_REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
    "INFERENCE_NUM_THREADS",
)
GROWTH = 1.5
"""Caches grow by this factor, so that copying them costs a constant share of the work."""


class PagedModel:
    """One compiled decoder with a paged KV cache of one sequence; implements `model.CausalModel`.

    Args:
        compiled: A model that `loading.load_model` has compiled.
        plan: How.
        attention: What its layers see where the attention op is ours; None for OpenVINO's.
        mlp: What runs its fused MLPs and why; None where it has none.
    """

    def __init__(
        self, compiled: ov.CompiledModel, plan: CompilePlan, attention: BlockAttention | None, mlp: str | None
    ) -> None:
        self._compiled, self._plan, self._attention, self._mlp = compiled, plan, attention, mlp
        self.device, self.context_length = plan.device, plan.context_length
        self.vocab_size = int(compiled.output("logits").get_partial_shape()[2].get_length())
        self._request = compiled.create_infer_request()
        # On one thread the plugin runs in the caller's own; a hand-over to its thread would only add its wake-up time.
        self._is_inline = plan.device == "CPU" and plan.num_threads == 1
        names = {name for port in compiled.inputs for name in port.get_names()}
        self._has_positions = "position_ids" in names
        self._alive: dict[str, NDArray[Any]] = {}
        self._buffers: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._is_computing = self._is_whole = False
        self._num_tokens, self._bound = 0, (0, 0)
        self.cache: KvCache
        self._begin_anew()

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self._num_tokens if self._is_whole else 0

    def forward(self, token_ids: list[int], num_rows: int) -> Rows:
        """Append T tokens and return the logits of the last `num_rows`, (num_rows, V): valid until the next call.

        Raises:
            ContextOverflowError: The context does not hold them.
        """
        self._settle()
        past, width = self._num_tokens, len(token_ids)
        end = past + width
        self._check_fits(end)
        self._is_whole = False
        if end > self.cache.capacity:
            self.cache.reserve(min(max(end, int(self.cache.capacity * GROWTH)), self.context_length))
        if self._bound != (width, num_rows):
            self._bind(width, num_rows)
        ids, positions = self._buffers[width]
        if width == 1:
            ids[0], positions[0] = token_ids[0], past
        else:
            ids[:], positions[:] = token_ids, range(past, end)
        self.cache.hold(past, end)
        self._is_whole = True
        self._infer()
        self._num_tokens = end
        rows: Rows = self._request.get_output_tensor(0).data
        return rows.reshape(num_rows, self.vocab_size)

    def forward_sequences(
        self, token_ids: Sequence[list[int]], past: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> Rows:
        """Append tokens to each of B sequences; return the logits after the last of each, (B, V).

        `reserve_sequences` comes first, see `batch.SequenceBatch`.

        Args:
            token_ids: Token ids of each sequence, at least one.
            past: (B,) tokens of each that are there already.
            blocks: (B, n) blocks of each.
        """
        ends = [int(begin) + len(ids) for begin, ids in zip(past, token_ids, strict=True)]
        positions = np.concatenate([np.arange(*span) for span in zip(past, ends, strict=True)])
        begins = np.cumsum([0, *map(len, token_ids)], dtype=np.int32)
        self._bind_tokens(np.concatenate(token_ids).astype(np.int64), positions, begins, begins[1:] - 1)
        self.cache.hold_sequences(past, max(ends), blocks)
        self._infer()
        rows: Rows = self._request.get_output_tensor(0).data
        return rows.reshape(len(past), self.vocab_size)

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens, or none where what they see is gone; forget the rest, return the kept."""
        self._settle()
        if num_tokens < self._num_tokens:
            self._is_whole = False
            self._num_tokens = self.cache.rollback(num_tokens)
            self._is_whole = True
        return self._num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Allocate the caches for `num_tokens` tokens, or for the context's length if that is less."""
        self._settle()
        self._is_whole = False
        self.cache.reserve(min(num_tokens, self.context_length))
        self._is_whole = True

    def reserve_sequences(self, blocks: int) -> None:
        """Give up the sequence held, and make room for so many blocks of several; the next `forward` begins anew."""
        self._settle()
        self._is_whole = False
        self.cache.reserve_blocks(blocks)

    def assume(self, num_tokens: int) -> None:
        """Take so many tokens for held, for which the caches have room: to measure what a step after them costs."""
        self._num_tokens = num_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.cache.block_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(int(tensor.get_byte_size()) for tensor in self.cache.tensors)

    @property
    def properties(self) -> dict[str, Any]:
        """What the plugin really uses, for reports: arithmetic and why, keys and values, threads, added properties."""
        names = [name for name in _REPORTED if name in self._compiled.get_property("SUPPORTED_PROPERTIES")]
        values = {name: self._compiled.get_property(name) for name in names}
        shown = {name.lower(): v.to_string() if isinstance(v, ov.Type) else v for name, v in values.items()}
        if not self._plan.rounds_activations:
            shown.pop("dynamic_quantization_group_size", None)
        ours = {"attention": "block_sparse", "kv_cache_precision": self._plan.kv_type} if self._attention else {}
        added = {"properties": self._plan.added_properties} if self._plan.added_properties else {}
        return shown | {"reason": self._plan.reason} | ours | ({"mlp": self._mlp} if self._mlp else {}) | added

    def _settle(self) -> None:
        """Make good what an interrupted call left: its inference may still run, or the caches be half changed."""
        if self._is_computing:
            with contextlib.suppress(RuntimeError):  # whoever asked for it has left
                self._request.wait()
            self._is_computing = False
        if not self._is_whole:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._is_whole = False
        self._num_tokens, self._bound = 0, (0, 0)
        self.cache = (
            BlockCache(self._compiled, self._request, self._attention)
            if self._attention
            else StockCache(self._compiled, self._request, self.device)
        )
        self.cache.reserve(1)
        self._is_whole = True

    def _infer(self) -> None:
        if self._is_inline:
            self._request.infer(share_outputs=True)
            return
        self._is_computing = True
        self._request.start_async()
        self._request.wait()
        self._is_computing = False

    def _bind(self, width: int, num_rows: int) -> None:
        """Bind the input buffers for T = `width` tokens."""
        if width not in self._buffers:
            self._buffers[width] = np.zeros(width, np.int64), np.zeros(width, np.int64)
        begins, rows = np.array([0, width], np.int32), np.arange(width - num_rows, width, dtype=np.int32)
        self._bind_tokens(*self._buffers[width], begins, rows)
        self._bound = width, num_rows

    def _bind_tokens(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        begins: NDArray[np.int32],
        rows: NDArray[np.int32],
    ) -> None:
        self._set("input_ids", token_ids)
        if self._has_positions:
            self._set("position_ids", positions)
        self._set("subsequence_begins", begins)
        self._set(LOGITS_ROWS, rows)

    def _set(self, name: str, values: NDArray[Any]) -> None:
        self._alive[name] = values  # the tensor only points into it
        self._request.set_tensor(name, ov.Tensor(values, shared_memory=True))

    def _check_fits(self, num_tokens: int) -> None:
        if num_tokens > self.context_length:
            raise ContextOverflowError(
                f"{num_tokens} tokens do not fit the model's context of {self.context_length}",
                "shorten the prompt, or use a model with a longer context",
            )
