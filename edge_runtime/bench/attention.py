"""What attention that sees a part of the context saves, by its length: one layer, and a whole model.

    edge   our op BlockSparseAttention, full and with the patterns of LongGen and S2-Attention
    genai  OpenVINO's PagedAttention, the op that openvino.genai runs, in our loop; it always sees everything

All variants run in turn at each context. Decoding is a step of one token at the end of it; prefill is the whole prompt,
from chunks timed at some places of it, since a chunk's time is a line in the tokens before it (two, at a window's end).

`formula_ratio` is what a pattern promises over full attention: for a layer the keys that queries see (bytes in
decoding, products in prefill), for a model in decoding the bytes of weights, keys and values; a model's prefill is
dominated by matrix products, and has none. `ratio` is the time of full attention of the same impl / this time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bench.attention_variants import Case, OwnLayer, StockLayer, Variant, WholeModel
from edge_runtime.bench.settings import AttentionSettings
from edge_runtime.config import LoadConfig
from edge_runtime.manifest import Manifest, load_manifest, weight_bytes
from edge_runtime.models.attention import BLOCK_SIZE, FULL, AttentionPattern, LayerPattern, longgen, s2
from edge_runtime.models.loading import load_model, read_model
from edge_runtime.models.paged import PagedModel
from edge_runtime.models.passes.block_sparse_attention import LayerShape, layer_heads
from edge_runtime.models.passes.paged_attention import to_paged_attention

PLACES = 5
"""Number of places along a prompt at which a chunk is timed."""
WARM_UP = 1

Times = NDArray[np.float64]


class AttentionBench:
    """Measures all contexts, of one layer and, if given, of a model.

    Args:
        settings: What is measured.
        model: A model folder whose weights every pattern gets; None for one layer alone.
        scopes: What of it: `layer`, `model`; None for all there is.
    """

    def __init__(
        self, settings: AttentionSettings, model: Path | None = None, scopes: tuple[str, ...] | None = None
    ) -> None:
        self._settings, self._model = settings, model
        self._scopes = scopes or (("layer", "model") if model else ("layer",))
        self._rows: list[dict[str, Any]] = []

    @property
    def num_cells(self) -> int:
        """What `run` yields."""
        return len(self._settings.contexts) * len(self._scopes)

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished rows."""
        return self._rows

    def run(self) -> Iterator[None]:
        """Measure; yield after each context."""
        for scope in self._scopes:
            for context in self._settings.contexts:
                self._measure(scope, context, self._layers(context) if scope == "layer" else self._models(context))
                yield

    def _layers(self, context: int) -> list[Variant]:
        settings = self._settings
        shape = LayerShape(settings.num_heads, settings.num_kv_heads, settings.head_size, settings.head_size)
        self._heads, self._weight_bytes = (shape.num_heads, shape.num_kv_heads), 0
        seen = cases(settings, 1, shape.num_kv_heads)
        made: list[Variant] = [OwnLayer(shape, case, context) for case in seen]
        return [*made, StockLayer(shape, seen[0], context)] if context <= settings.longest_peer else made

    def _models(self, context: int) -> list[Variant]:
        assert self._model is not None
        manifest = dataclasses.replace(load_manifest(self._model), context_length=None)
        stock = _load(self._model, manifest, attention="stock")
        self._weight_bytes = weight_bytes(self._model)
        heads = _layer_heads(self._model)
        self._heads = heads[0]
        seen = cases(self._settings, len(heads), heads[0][1])
        made: list[Variant] = []
        for case in seen:
            sparse = dataclasses.replace(manifest, attention=case.pattern)
            made.append(WholeModel("edge", case, _load(self._model, sparse), context))
        return [*made, WholeModel("genai", seen[0], stock, context)] if context <= self._settings.longest_peer else made

    def _measure(self, scope: str, context: int, variants: list[Variant]) -> None:
        """Time all variants in turn, chunk by chunk and then decoding; add their rows."""
        chunk = self._settings.chunk
        places = np.unique(np.linspace(0, context - chunk, PLACES).astype(int) // BLOCK_SIZE * BLOCK_SIZE)
        chunks = np.array([self._time(variants, int(place), chunk) for place in places])
        between = np.diff(places)[:, None, None] * (chunks[1:] + chunks[:-1]) / 2
        prefill = between.sum(axis=0) / chunk + (chunks[0] + chunks[-1]) / 2
        decode = self._time(variants, context - 1, 1)
        for phase, times in (("prefill", prefill), ("decode", decode)):
            full_bytes = variants[0].kv_bytes
            made = [self._row(scope, context, phase, full_bytes, *pair) for pair in zip(variants, times, strict=True)]
            for row in made:
                full = next(other for other in made if (other["impl"], other["pattern"]) == (row["impl"], "full"))
                row["ratio"] = round(full["ms"] / row["ms"], 3)
            self._rows += made

    def _time(self, variants: list[Variant], place: int, count: int) -> Times:
        """Return ms of each variant and round, (variants, rounds), of a step of `count` tokens at `place`."""
        for variant in variants:
            variant.place(place, place + count)
        rounds = self._settings.rounds if count == 1 else max(2, self._settings.rounds // 3)
        times = np.zeros((len(variants), WARM_UP + rounds))
        for turn in range(WARM_UP + rounds):
            for index, variant in enumerate(variants):
                if count == 1:
                    variant.step(count)  # brings back the program and wakes the threads
                begin = time.perf_counter()
                variant.step(count)
                times[index, turn] = 1000 * (time.perf_counter() - begin) / variant.repeats
        return times[:, WARM_UP:]

    def _row(
        self, scope: str, context: int, phase: str, full_bytes: int, variant: Variant, times: Times
    ) -> dict[str, Any]:
        low, middle, high = np.quantile(times, (0.1, 0.5, 0.9))
        formula = self._formula(variant.case.pattern, context, phase, full_bytes)
        return {
            "impl": variant.impl,
            "pattern": variant.case.name,
            "stride": variant.case.stride,
            "context": context,
            "phase": phase,
            "scope": scope,
            "ms": round(float(middle), 4),
            "ms_p10": round(float(low), 4),
            "ms_p90": round(float(high), 4),
            "kv_bytes": variant.kv_bytes,
            "formula_ratio": None if scope == "model" and phase == "prefill" else round(formula, 3),
        }

    def _formula(self, pattern: AttentionPattern, context: int, phase: str, full_bytes: int) -> float:
        """Return the time of full attention over that of a pattern, by what has to be read or multiplied.

        Args:
            pattern: Attention pattern of all layers.
            context: Context length, in tokens.
            phase: `prefill` or `decode`.
            full_bytes: Bytes of keys and values with full attention.
        """
        num_heads, num_kv_heads = self._heads
        layers = len(pattern.layers) * num_kv_heads

        def seen(tokens: int) -> int:
            return pattern.held_tokens(tokens, num_kv_heads, num_heads)

        if phase == "prefill":
            ends = range(BLOCK_SIZE, context + 1, max(BLOCK_SIZE, context // 64))
            return sum(layers * end for end in ends) / sum(seen(end) for end in ends)
        kept = min(1.0, seen(context) / (layers * context))
        return (self._weight_bytes + full_bytes) / (self._weight_bytes + kept * full_bytes)


def _load(folder: Path, manifest: Manifest, attention: str = "auto") -> PagedModel:
    model = load_model(folder, manifest, LoadConfig(attention=attention, kv_precision="u8"))
    assert isinstance(model, PagedModel), "the CPU has no other"
    return model


def _layer_heads(folder: Path) -> list[tuple[int, int]]:
    """Return H and H_kv of each layer."""
    model, _ = read_model(folder)
    to_paged_attention(model)
    return layer_heads(model)


def cases(settings: AttentionSettings, num_layers: int, num_kv_heads: int) -> list[Case]:
    """Return full attention, LongGen and S2-Attention for a model's layers, or for one sparse layer of such a model."""
    num_full = 0 if num_layers == 1 else None
    made = [
        Case("full", 0, AttentionPattern.of_layers([FULL] * num_layers)),
        Case("longgen", 0, longgen(num_layers, window=settings.kept - BLOCK_SIZE, num_full=num_full)),
    ]
    for stride in settings.strides:
        if num_layers > 1:
            pattern = s2(num_layers, num_kv_heads, window=settings.window, stride=stride)
        else:  # the other layers have the other shards
            shards = tuple(head % stride for head in range(num_kv_heads))
            pattern = AttentionPattern.of_layers([LayerPattern(window=settings.window, stride=stride, offsets=shards)])
        made.append(Case("s2", stride, pattern))
    return made
