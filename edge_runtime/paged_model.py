"""A decoder on CPU or GPU: PagedAttention driven from Python.

The plugin writes keys and values into cache tensors that we own and pass as inputs, one pair for each layer. Rolling
back is passing a smaller `past_lens`: nothing is copied, and what lies behind it is overwritten later. A step writes a
few numbers into buffers that stay bound to the request; tensors are bound anew only when the number of
tokens or blocks changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

import ov_kernels
from edge_runtime.config import LoadConfig
from edge_runtime.devices import compile_properties, core, num_threads
from edge_runtime.errors import ContextOverflowError, DeviceError, ModelFormatError
from edge_runtime.manifest import MODEL_NAME, Manifest
from edge_runtime.model import Rows
from edge_runtime.paged_graph import LOGITS_ROWS, first_line, group_input, to_paged_attention, weight_group_size

UNKNOWN_CONTEXT_LENGTH = 1 << 20
"""Used where a folder does not say how long its context is."""
CACHE_ALIGNMENT = 64
"""Bytes of a cache line, which a vector load should not cross."""
GROWTH = 1.5
"""Caches grow by this factor, so that copying them costs a constant share of the work."""


class AttentionGroup:
    """Layers that share one block list, and the inputs that carry it.

    Args:
        request: The infer request of the model.
        number: Of the group.
        layers: Of the model, in order.
    """

    def __init__(self, request: ov.InferRequest, number: int, layers: Sequence[int]) -> None:
        self.layers = layers
        self.num_blocks = 0
        self._request = request
        self._number = number
        self._past_lens = self._bind("past_lens", np.zeros(1, np.int32))
        self._max_context_len = self._bind("max_context_len", np.zeros((), np.int32))
        self._begins = self._bind("block_indices_begins", np.zeros(2, np.int32))

    def use_blocks(self, num_blocks: int) -> None:
        """Let the block list be the first `num_blocks` blocks of the group's caches."""
        self.num_blocks = num_blocks
        self._begins[1] = num_blocks
        self._blocks = self._bind("block_indices", np.arange(num_blocks, dtype=np.int32))

    def use_sequences(self, past: NDArray[np.int32], longest: int, blocks: NDArray[np.int32]) -> None:
        """Hold several sequences: (B,) tokens of each that are there, and (B, n) blocks of each."""
        begins = np.arange(0, blocks.size + 1, blocks.shape[1], dtype=np.int32)
        self._past_lens = self._bind("past_lens", past)
        self._max_context_len = self._bind("max_context_len", np.array(longest, np.int32))
        self._begins = self._bind("block_indices_begins", begins)
        self._blocks = self._bind("block_indices", blocks.ravel())

    def set_span(self, past: int, end: int) -> None:
        """Say that tokens `past` to `end` are being computed."""
        self._past_lens[0] = past
        self._max_context_len[...] = end

    def _bind(self, name: str, values: NDArray[np.int32]) -> NDArray[np.int32]:
        self._request.set_tensor(group_input(name, self._number), ov.Tensor(values, shared_memory=True))
        return values


class PagedModel:
    """One compiled decoder with a paged KV cache of one sequence; implements `model.CausalModel`.

    Args:
        folder: A model folder.
        manifest: Its facts.
        device: OpenVINO device, checked already.
        config: How to compile.

    Raises:
        ModelFormatError: The model's files are damaged or not a decoder.
        DeviceError: The device cannot compile it with these options.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str, config: LoadConfig) -> None:
        model, weight_bytes = read_model(folder)
        to_paged_attention(model, manifest.attention_groups)
        properties = compile_properties(device, config, weight_bytes, weight_group_size(model))
        self._mlp = choose_mlps(model, manifest, device, config, properties)
        self._compiled = _compile(model, device, config, properties)
        del model
        self.device = device
        self.vocab_size = int(self._compiled.output("logits").get_partial_shape()[2].get_length())
        self.context_length = manifest.context_length or UNKNOWN_CONTEXT_LENGTH
        self.num_tokens = 0
        self._request = self._compiled.create_infer_request()
        # On one thread the plugin runs in the caller's own; a hand-over to its thread would only add its wake-up time.
        is_inline = device == "CPU" and num_threads(config, weight_bytes) == 1
        self._infer = partial(self._request.infer, share_outputs=True) if is_inline else self._start_and_wait
        names = {name for port in self._compiled.inputs for name in port.get_names()}
        self._has_positions = "position_ids" in names
        self._cache_ports = {name: self._compiled.input(name) for name in names if name.startswith(_CACHES)}
        self._block_size = int(self._cache_ports["value_cache.0"].get_partial_shape()[2].get_length())
        num_layers = len(self._cache_ports) // 2
        layers = manifest.attention_groups or (tuple(range(num_layers)),)
        self.groups = [AttentionGroup(self._request, i, group) for i, group in enumerate(layers)]
        self._alive: dict[str, NDArray[Any]] = {}
        self._buffers: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._bound: tuple[int, int] = (0, 0)
        self.reserve(1)

    def forward(self, token_ids: list[int], num_rows: int) -> Rows:
        """Append T tokens and return the logits of the last `num_rows`, (num_rows, V): valid until the next call.

        Raises:
            ContextOverflowError: The context does not hold them.
        """
        past, width = self.num_tokens, len(token_ids)
        end = past + width
        if end > self._capacity:
            self._grow(end)
        if self._bound != (width, num_rows):
            self._bind(width, num_rows)
        ids, positions = self._buffers[width]
        if width == 1:
            ids[0], positions[0] = token_ids[0], past
        else:
            ids[:], positions[:] = token_ids, range(past, end)
        for group in self.groups:
            group.set_span(past, end)
        self._infer()
        self.num_tokens = end
        rows: Rows = self._request.get_output_tensor(0).data
        return rows.reshape(num_rows, self.vocab_size)

    def forward_sequences(
        self, token_ids: Sequence[list[int]], past: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> Rows:
        """Append tokens to each of B sequences; return the logits after the last of each, (B, V).

        From then on the model holds these sequences in place of its own, see `batch.SequenceBatch`.

        Args:
            token_ids: Of each sequence, at least one.
            past: (B,) tokens of each that are there already.
            blocks: (B, n) blocks of each.
        """
        ends = [int(begin) + len(ids) for begin, ids in zip(past, token_ids, strict=True)]
        positions = np.concatenate([np.arange(*span) for span in zip(past, ends, strict=True)])
        begins = np.cumsum([0, *map(len, token_ids)], dtype=np.int32)
        self._bind_tokens(np.concatenate(token_ids).astype(np.int64), positions, begins, begins[1:] - 1)
        for group in self.groups:
            group.use_sequences(past, max(ends), blocks)
        self._infer()
        rows: Rows = self._request.get_output_tensor(0).data
        return rows.reshape(len(past), self.vocab_size)

    def rollback(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens and forget the rest."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def reserve(self, num_tokens: int) -> None:
        """Allocate the caches for `num_tokens` tokens, or for the context's length if that is less."""
        self.reserve_blocks(self.blocks_for(min(num_tokens, self.context_length)))

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self._block_size)

    def reserve_blocks(self, blocks: int) -> None:
        """Allocate at least so many blocks in the caches of every group."""
        for group in self.groups:
            if blocks > group.num_blocks:
                for layer in group.layers:
                    for name in _CACHES:
                        self._grow_cache(f"{name}{layer}", group.num_blocks, blocks)
                group.use_blocks(blocks)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(int(self._request.get_tensor(port).get_byte_size()) for port in self._cache_ports.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of keys and values in all layers."""
        return self.kv_bytes // min(group.num_blocks for group in self.groups)

    @property
    def properties(self) -> dict[str, Any]:
        """What the plugin really uses, for reports: threads, precision of arithmetic and of keys and values."""
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS")
        values = {name.lower(): self._compiled.get_property(name) for name in names}
        shown = {name: v.to_string() if isinstance(v, ov.Type) else v for name, v in values.items()}
        return shown | ({"mlp": self._mlp} if self._mlp else {})

    @property
    def _capacity(self) -> int:
        return min(group.num_blocks for group in self.groups) * self._block_size

    def _start_and_wait(self) -> None:
        self._request.start_async()
        self._request.wait()

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

    def _grow(self, num_tokens: int) -> None:
        if num_tokens > self.context_length:
            raise ContextOverflowError(
                f"{num_tokens} tokens do not fit the model's context of {self.context_length}",
                "shorten the prompt, or use a model with a longer context",
            )
        self.reserve(max(num_tokens, int(self._capacity * GROWTH)))

    def _grow_cache(self, name: str, old_blocks: int, new_blocks: int) -> None:
        port = self._cache_ports[name]
        shape = [new_blocks] + [dimension.get_length() for dimension in list(port.get_partial_shape())[1:]]
        grow = self._grow_on_gpu if self.device.startswith("GPU") else self._grow_on_host
        self._request.set_tensor(port, grow(name, port.get_element_type(), shape, old_blocks))

    def _grow_on_host(self, name: str, element_type: ov.Type, shape: list[int], old_blocks: int) -> ov.Tensor:
        """Allocate bytes that are touched only when used, and copy the old ones: blocks are the outermost axis."""
        old = self._alive.get(name)
        size = math.prod(shape) * element_type.bitwidth // 8
        buffer = np.zeros(size + CACHE_ALIGNMENT, np.uint8)
        first = -buffer.ctypes.data % CACHE_ALIGNMENT
        self._alive[name] = buffer[first : first + size]
        if old is not None and self.num_tokens:
            self._alive[name][: len(old)] = old
        return ov.Tensor(self._alive[name], ov.Shape(shape), element_type)

    def _grow_on_gpu(self, name: str, element_type: ov.Type, shape: list[int], old_blocks: int) -> Any:
        new = core().get_default_context(self.device).create_tensor(element_type, ov.Shape(shape), {})
        if old_blocks and self.num_tokens:
            kept = ov.RemoteTensor(new, ov.Coordinate([0] * len(shape)), ov.Coordinate([old_blocks, *shape[1:]]))
            self._request.get_tensor(self._cache_ports[name]).copy_to(kept)
        return new


_CACHES = ("key_cache.", "value_cache.")
OUR_OPSET = b'version="edge"'
"""How an IR marks an op of ov_kernels."""


def read_model(folder: Path) -> tuple[ov.Model, int]:
    """Read the IR of a model folder and return it with the bytes of its weights.

    Raises:
        ModelFormatError: The files are missing, truncated or corrupt.
        ExtensionError: The model uses ops of ours, and the library that has them is absent, or older than they are.
    """
    path = folder / MODEL_NAME
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ModelFormatError(f"`{weights}` is missing", "copy or export the model again")
    try:
        if OUR_OPSET in path.read_bytes():
            ov_kernels.add_for(path, core())
        return core().read_model(path), weights.stat().st_size
    except RuntimeError as error:
        raise ov_kernels.explain_read_error(error) or ModelFormatError(
            f"`{path}` cannot be read: {first_line(error)}", "copy or export the model again"
        ) from error


def choose_mlps(
    model: ov.Model, manifest: Manifest, device: str, config: LoadConfig, properties: dict[str, Any]
) -> str | None:
    """Bring fused MLPs into the form that is to run; return what it is, None where there are none."""
    if not any(node.get_type_name() == "CatsMlp" for node in model.get_ops()):
        return None
    from edge_runtime import fused_mlp

    sparsity = manifest.mlp.activation_sparsity if manifest.mlp else None
    return fused_mlp.choose_mlps(model, device, config, properties, sparsity or 0.0)


def _compile(model: ov.Model, device: str, config: LoadConfig, properties: dict[str, Any]) -> ov.CompiledModel:
    try:
        compiled = core().compile_model(model, device, properties)
    except RuntimeError as error:
        raise DeviceError(
            f"{device} cannot run the model with precision {config.precision} and kv_precision "
            f"{config.kv_precision}: {first_line(error)}",
            "leave both on `auto`",
        ) from error
    _check_precisions(compiled, device, config)
    return compiled


def _check_precisions(compiled: ov.CompiledModel, device: str, config: LoadConfig) -> None:
    """Refuse to run in other precisions than those asked for, which the plugin does without a word."""
    runs = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if config.precision not in ("auto", runs):
        raise DeviceError(
            f"{device} cannot compute in {config.precision}: it would use {runs}", f"use `{runs}` or `auto`"
        )
    keeps = compiled.input(f"{_CACHES[0]}0").get_element_type().to_string()
    if device == "CPU" and config.kv_precision not in ("auto", keeps):
        raise DeviceError(
            f"{device} cannot keep keys and values in {config.kv_precision} while it computes in {runs}: "
            f"it would use {keeps}",
            f"use `{keeps}` or `auto`",
        )
