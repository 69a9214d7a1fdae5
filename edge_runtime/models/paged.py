"""A decoder on CPU or GPU: attention over paged keys and values, driven from Python.

Keys and values lie in blocks that we own and pass as inputs, shared by all sequences (`kv/`): for OpenVINO's
PagedAttention, or for our own op, whose layers hold only what they still see. A step writes a few numbers into buffers
that stay bound to the request; tensors are bound anew only when the spans have other sizes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edge_runtime import __version__, strict_json
from edge_runtime.errors import ConfigError, ContextOverflowError
from edge_runtime.models.base import Output, Rows, Span, catch_up
from edge_runtime.models.cpu_facts import cpu_facts
from edge_runtime.models.kv.files import Facts, Snapshot, read_blocks, read_header, trusted
from edge_runtime.models.kv.folder import PrefixFolder
from edge_runtime.models.kv.inputs import BlockInputs, OwnInputs, StockInputs
from edge_runtime.models.kv.pool import own_pools, stock_pools
from edge_runtime.models.kv.sequence import PagedSequence, Sequences
from edge_runtime.models.passes.block_sparse_attention import BlockAttention
from edge_runtime.models.passes.wanted_rows import LOGITS_ROWS
from edge_runtime.models.plan import CompilePlan

_REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
    "INFERENCE_NUM_THREADS",
)
_SAME_BYTES = ("PERFORMANCE_HINT", "CACHE_DIR", "INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING")
"""Properties that change nothing in keys and values."""
MAX_SEQUENCES = 16
"""A choice, not tuned: one reading of the weights serves 16 sequences, and a step still ends soon."""
_MOST_SHAPES = 64
"""Shapes of a step whose buffers are kept."""

Shape = tuple[tuple[int, int], ...]
"""Tokens and wanted rows of each span."""


class PagedModel:
    """One compiled decoder with paged keys and values; implements `base.CausalModel`.

    Args:
        compiled: A model that `loading.load_model` has compiled.
        plan: How it was compiled.
        attention: What its layers see where the attention op is ours; None for OpenVINO's.
        mlp: What runs its fused MLPs and why; None where it has none.
        identity: Called where keys and values are saved or loaded; returns the SHA-256 of each of the model's files.
    """

    max_sequences = MAX_SEQUENCES

    def __init__(
        self,
        compiled: ov.CompiledModel,
        plan: CompilePlan,
        attention: BlockAttention | None,
        mlp: str | None,
        identity: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self._compiled, self._plan, self._has_own_attention, self._mlp = compiled, plan, attention is not None, mlp
        self.device, self.context_length, self.chunk_size = plan.device, plan.context_length, plan.chunk_size
        self.vocab_size = int(compiled.output("logits").get_partial_shape()[2].get_length())
        self._request = compiled.create_infer_request()
        # On one thread the plugin runs in the caller's own; a hand-over to its thread would only add its wake-up time.
        self._is_inline = plan.device == "CPU" and plan.num_threads == 1
        names = {name for port in compiled.inputs for name in port.get_names()}
        self._has_positions = "position_ids" in names
        self._inputs: BlockInputs
        if attention:
            pools = own_pools(compiled, self._request, attention)
            self._inputs = OwnInputs(self._request, pools)
        else:
            pools = stock_pools(compiled, self._request, plan.device)
            self._inputs = StockInputs(self._request, pools)
        self._identity, self._pools = identity, pools
        folder = plan.prefix_cache_dir
        files = PrefixFolder(folder, self._facts, pools, plan.prefix_cache_bytes) if folder else None
        self._sequences = Sequences(pools, plan.context_length, plan.prefix_cache_bytes, files)
        self._steps: dict[Shape, _Step] = {}
        self._bound: _Step | None = None

    def sequence(self, token_ids: list[int] | None = None) -> PagedSequence:
        """Return a new sequence, which holds as much of the beginning of `token_ids` as is still held anywhere."""
        return self._sequences.open(token_ids or [])

    def forward(self, spans: list[Span]) -> list[Output]:
        """Append tokens to sequences; return an output for each span.

        Where it raises, the sequences hold what they held before.

        Raises:
            ContextOverflowError: The context does not hold them.
        """
        shape, longest = [], 0
        sequence: Any  # a PagedSequence, as `sequence` made it
        for sequence, token_ids, num_rows in spans:
            shape.append((len(token_ids), num_rows))
            longest = max(longest, len(sequence.token_ids) + len(token_ids))
        if longest > self.context_length:
            raise ContextOverflowError(
                f"{longest} tokens do not fit the model's context of {self.context_length}",
                "shorten the prompt, or use a model with a longer context",
            )
        step = self._step_for(tuple(shape))
        for sequence, token_ids, _ in spans:
            past = len(sequence.token_ids)
            for table in sequence.tables:
                table.hold(past, past + len(token_ids))
        step.write(spans)
        self._inputs.write(spans, longest)
        logits, *others = self._infer()
        for sequence, token_ids, _ in spans:
            sequence.token_ids.extend(token_ids)
        logits = logits.reshape(step.num_rows, self.vocab_size)
        hidden = others[0].reshape(step.num_rows, -1) if others else None
        if len(spans) == 1:
            return [Output(logits, hidden)]
        return [Output(logits[part], hidden if hidden is None else hidden[part]) for part in step.parts]

    def close(self) -> None:
        """Give the memory back, once what is kept is written to the plan's folder; the model is not used any more."""
        self._sequences.end()
        for name in ("_sequences", "_inputs", "_steps", "_bound", "_pools", "_request", "_compiled"):
            vars(self).pop(name, None)

    def save(self, path: Path, token_ids: list[int]) -> None:
        """Write the keys and values of some tokens, which are computed if need be, whole or not at all.

        Raises:
            ConfigError: The file cannot be written.
            ContextOverflowError: The context does not hold the tokens.
            DeviceError: They are on a GPU.
        """
        sequence = self.sequence(token_ids)
        try:
            catch_up(self, sequence, token_ids)
            Snapshot.of(sequence).write(path, self._facts)
        except OSError as error:
            raise ConfigError(f"`{path}` cannot be written: {error.strerror}", "name another file") from error
        finally:
            sequence.close()

    def load(self, path: Path) -> int:
        """Keep what `save` wrote; return how many tokens it is, 0 with one line in the log where it is not trusted.

        Raises:
            DeviceError: The model runs on a GPU.
        """
        file = trusted(lambda: read_header(path, self._facts), path)
        return self._sequences.keep(file and trusted(lambda: read_blocks(file, self._pools), path))

    @functools.cached_property
    def _facts(self) -> Facts:
        """What the bytes of blocks depend on."""
        properties = {name: str(v) for name, v in self._plan.properties.items() if name not in _SAME_BYTES}
        own = [asdict(pool.pattern) for pool in self._pools] if self._has_own_attention else None
        facts = {
            "model": self._identity(),
            "release": f"edge-run {__version__}, OpenVINO {ov.get_version()}",
            "device": self._plan.device,
            "precision": str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()),
            "set of options": properties,
            "form of its MLPs": self._mlp and self._mlp.partition(":")[0],
            "attention pattern": own,
            "KV precision": self._plan.kv_type if own else None,
            "layout of blocks": [[pool.num_kv_heads, pool.block_size, *pool.memory.layout] for pool in self._pools],
            "kind of processor": None if own else asdict(cpu_facts()),  # our own op writes the same bytes on all
        }
        plain: Facts = json.loads(strict_json.dumps(facts))
        return plain

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._sequences.num_bytes

    @property
    def token_kv_bytes(self) -> int:
        """Bytes that one more token takes in a sequence whose every layer sees everything."""
        return self._sequences.token_bytes

    def report(self) -> dict[str, Any]:
        """Return what the plugin really uses: arithmetic and why, keys and values, threads, added properties."""
        names = [name for name in _REPORTED if name in self._compiled.get_property("SUPPORTED_PROPERTIES")]
        values = {name: self._compiled.get_property(name) for name in names}
        shown = {name.lower(): v.to_string() if isinstance(v, ov.Type) else v for name, v in values.items()}
        if not self._plan.rounds_activations:
            shown.pop("dynamic_quantization_group_size", None)
        kv_type = self._plan.kv_type
        ours = {"attention": "block_sparse", "kv_cache_precision": kv_type} if self._has_own_attention else {}
        added = {"properties": self._plan.added_properties} if self._plan.added_properties else {}
        mlp = {"mlp": self._mlp} if self._mlp else {}
        return shown | {"reason": self._plan.reason} | ours | mlp | added | self._sequences.report()

    def _infer(self) -> Iterable[Rows]:
        """Run what is bound; return logits, (num_rows, 1, V), and hidden states where the model has them."""
        if self._is_inline:
            outputs: Iterable[Rows] = self._request.infer(share_outputs=True).values()
            return outputs
        self._request.start_async()
        self._request.wait()
        return [tensor.data for tensor in self._request.output_tensors]

    def _step_for(self, shape: Shape) -> _Step:
        """Return the buffers for a shape, bound to the request."""
        step = self._steps.get(shape)
        if step is None:
            if len(self._steps) == _MOST_SHAPES:
                del self._steps[next(iter(self._steps))]
            step = self._steps[shape] = _Step(shape, self._has_positions)
        if step is not self._bound:
            for name, tensor in step.tensors.items():
                self._request.set_tensor(name, tensor)
            self._bound = step
        return step


class _Step:
    """The inputs of a forward whose spans have certain sizes.

    Args:
        shape: The sizes.
        has_positions: Whether the model takes positions.

    Attributes:
        tensors: The inputs by name; they point into buffers of this object.
        num_rows: Rows of logits.
        parts: Those of each span.
    """

    def __init__(self, shape: Shape, has_positions: bool) -> None:
        begins = np.cumsum([0, *(width for width, _ in shape)], dtype=np.int32)
        rows = [range(end - num_rows, end) for end, (_, num_rows) in zip(begins[1:].tolist(), shape, strict=True)]
        edges = np.cumsum([0, *map(len, rows)]).tolist()
        self.num_rows, self.parts = edges[-1], list(map(slice, edges[:-1], edges[1:]))
        self._ids, self._positions = np.zeros(begins[-1], np.int64), np.zeros(begins[-1], np.int64)
        buffers = {
            "input_ids": self._ids,
            "subsequence_begins": begins,
            LOGITS_ROWS: np.concatenate(rows).astype(np.int32),
            **({"position_ids": self._positions} if has_positions else {}),
        }
        self._alive = buffers  # the tensors only point into them
        self.tensors = {name: ov.Tensor(values, shared_memory=True) for name, values in buffers.items()}

    def write(self, spans: list[Span]) -> None:
        """Write tokens and positions of spans that have these sizes."""
        if len(self._ids) == 1:
            sequence, (token_id,), _ = spans[0]
            self._ids[0], self._positions[0] = token_id, len(sequence.token_ids)
            return
        begin = 0
        for sequence, token_ids, _ in spans:
            past, end = len(sequence.token_ids), begin + len(token_ids)
            self._ids[begin:end] = token_ids
            self._positions[begin:end] = range(past, past + len(token_ids))
            begin = end
