"""The patterns of `edge_runtime.models.attention` as an attention of transformers, for training and for references.

Queries go in chunks; of each, only the keys that some head and query sees are read, with the mask written out. So
memory is bounded for long windows, and sink + window costs what it should; shards that together see everything save
nothing here: kernels are the runtime's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_export.hybrid.patterns import CONFIG_ENTRY
from edge_runtime import strict_json
from edge_runtime.models.attention import AttentionPattern, LayerPattern

if TYPE_CHECKING:
    import torch

NAME = "edge_hybrid"
CHUNK = 256
"""Queries whose mask is made at once."""


def use_pattern(model: Any, pattern: AttentionPattern) -> None:
    """Let a model's layers see what `pattern` says, in place, and its config say so."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    setattr(model.config, CONFIG_ENTRY, pattern.to_json())
    model.config._attn_implementation = NAME


@contextlib.contextmanager
def patterned(model: Any, pattern: AttentionPattern | None) -> Iterator[None]:
    """Let a model's layers see what `pattern` says inside a `with` block."""
    if pattern is None:
        yield
        return
    before = model.config._attn_implementation
    entry = getattr(model.config, CONFIG_ENTRY, None)
    use_pattern(model, pattern)
    try:
        yield
    finally:
        model.config._attn_implementation = before
        if entry is None:
            delattr(model.config, CONFIG_ENTRY)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return (B, T, H, D) of queries (B, H, T, D) on keys (B, H_kv, S, D); the last query is at position S - 1."""
    import torch

    pattern = _pattern_of(module.config).of_layer(module.layer_idx)
    size = _pattern_of(module.config).block_size
    (_, heads, length, _), total = query.shape, key.shape[2]
    parts = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        keys, mask = _seen(pattern, size, heads, total - length + begin, total - length + end)
        index = torch.from_numpy(keys).to(query.device)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, begin:end],
                key.index_select(2, index),
                value.index_select(2, index),
                attn_mask=torch.from_numpy(mask).to(query.device),
                dropout_p=dropout if module.training else 0.0,
                scale=scaling,
                enable_gqa=key.shape[1] != heads,
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _pattern_of(config: Any) -> AttentionPattern:
    return _parsed(strict_json.dumps(getattr(config, CONFIG_ENTRY)))


@lru_cache(maxsize=8)
def _parsed(text: str) -> AttentionPattern:
    import json

    return AttentionPattern.from_json(json.loads(text))


@lru_cache(maxsize=64)
def _seen(pattern: LayerPattern, size: int, heads: int, begin: int, end: int) -> tuple[Any, Any]:
    """Return the keys (n,) that queries `begin` to `end` see, and which query of which head sees which, (H, T, n)."""
    mask = pattern.token_mask(np.arange(begin, end), end, heads, size)
    keys = np.flatnonzero(mask.any(axis=(0, 1)))
    return keys, np.ascontiguousarray(mask[:, :, keys])
